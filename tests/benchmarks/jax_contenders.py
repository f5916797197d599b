"""The full step by optloss and by the chain that people write from Optax's parts."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from workers import Contender

import optloss

__all__ = [
    "CLIP",
    "MULTIPLIER",
    "NOISE",
    "RATE",
    "add_noise",
    "carried",
    "optax_chain",
    "optax_step",
    "optax_transformation",
    "optloss_step",
    "optloss_transformation",
]

RATE, NOISE, MULTIPLIER, CLIP = 1e-3, 0.01, 0.5, 1.0


STEPS = 10  # in a scan


@jax.custom_vjp
def given(params: Any, gradients: Any) -> jax.Array:
    """A loss whose gradients are given and cost nothing."""
    del params, gradients
    return jnp.zeros(())


given.defvjp(lambda params, gradients: (jnp.zeros(()), gradients), lambda gradients, _: (gradients, None))


def optloss_step(shapes: Sequence[tuple[int, ...]], noise: bool, in_scan: bool, nonfinite: str = "skip") -> Contender:
    """`train.update`, with every norm."""
    params = zeros(shapes)
    train = optloss.optimize_loss(given, 0, RATE, "Adam", nonfinite=nonfinite, **settings(params, noise))
    return training_step(train.update, train.init(params), in_scan)


def optax_step(shapes: Sequence[tuple[int, ...]], noise: bool, in_scan: bool) -> Contender:
    """The chain, with every norm."""
    params = zeros(shapes)
    names = list(params)[::3]
    chain = optax_chain({name: name in names for name in params}, noise)

    def update(state: tuple[Any, Any], gradients: optax.Updates) -> tuple[tuple[Any, Any], None]:
        params, chain_state = state
        updates, chain_state = chain.update(gradients, chain_state, params)
        return (optax.apply_updates(params, updates), chain_state), None

    return training_step(update, (params, chain.init(params)), in_scan)


def optloss_transformation(shapes: Sequence[tuple[int, ...]]) -> Contender:
    """The full step as one transformation; its updates are written over the donated gradients."""
    params = zeros(shapes)
    return donated_step(optloss.transformation(0, RATE, "Adam", **settings(params, noise=True)), params)


def optax_transformation(shapes: Sequence[tuple[int, ...]]) -> Contender:
    """The chain in the same way."""
    params = zeros(shapes)
    names = list(params)[::3]
    return donated_step(optax_chain({name: name in names for name in params}), params)


def settings(params: dict[str, jax.Array], noise: bool) -> dict[str, Any]:
    """What both faces of optloss are given."""
    return {
        "gradient_noise_scale": NOISE if noise else None,
        "gradient_multipliers": dict.fromkeys(list(params)[::3], MULTIPLIER),
        "clip_gradients": CLIP,
        "summaries": ["gradient_norm"],
        "key": 0 if noise else None,
    }


def optax_chain(mask: Any, noise: bool = True) -> optax.GradientTransformationExtraArgs:
    """Noise, multipliers, norms, clip and Adam."""
    return optax.chain(
        add_noise(NOISE, 0) if noise else optax.identity(),
        optax.masked(optax.scale(MULTIPLIER), mask),
        record_norms(),
        optax.clip_by_global_norm(CLIP),
        optax.adam(RATE),
    )


def add_noise(scale: float, seed: int) -> optax.GradientTransformation:
    """The truncated normal noise of `jax.random`, with a key for each array."""

    def init_fn(params: optax.Params) -> jax.Array:
        del params
        return jax.random.key(seed)

    def update_fn(
        updates: optax.Updates, state: jax.Array, params: optax.Params | None = None
    ) -> tuple[optax.Updates, jax.Array]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        state, *keys = jax.random.split(state, len(leaves) + 1)
        noisy = [
            leaf + scale * jax.random.truncated_normal(key, -2.0, 2.0, leaf.shape, leaf.dtype)
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(treedef, noisy), state

    return optax.GradientTransformation(init_fn, update_fn)


def record_norms() -> optax.GradientTransformation:
    """Keeps the norm of each array in the state; before the clip, where the sums are shared with it."""

    def init_fn(params: optax.Params) -> optax.Updates:
        return jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), params)

    def update_fn(
        updates: optax.Updates, state: optax.Updates, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.Updates]:
        del state, params
        return updates, jax.tree.map(lambda leaf: jnp.sqrt(jnp.sum(jnp.square(leaf))), updates)

    return optax.GradientTransformation(init_fn, update_fn)


def training_step(update: Callable[..., tuple[Any, Any]], state: Any, in_scan: bool) -> Contender:
    """A step on a donated state: on gradients that are given, or in a scan whose steps make theirs, as in training."""
    gradients = normal(state.params if isinstance(state, optloss.TrainState) else state[0])

    def steps(state: Any, gradients: Any) -> tuple[Any, Any]:
        def step(state: Any, factor: jax.Array) -> tuple[Any, Any]:
            return update(state, jax.tree.map(lambda gradient: gradient * factor, gradients))

        return jax.lax.scan(step, state, jnp.linspace(0.5, 1.0, STEPS))

    if in_scan:
        return carried(steps, state, gradients, repeats=STEPS)
    return carried(update, state, gradients)


def donated_step(transformation: optax.GradientTransformationExtraArgs, params: dict[str, jax.Array]) -> Contender:
    """A step whose updates are the gradients of the next."""

    def step(carry: tuple[Any, Any, Any]) -> tuple[tuple[Any, Any, Any], None]:
        gradients, params, state = carry
        updates, state = transformation.update(gradients, state, params)
        return (updates, optax.apply_updates(params, updates), state), None

    return carried(step, (normal(params), params, transformation.init(params)))


def normal(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Normal numbers in the shapes of the parameters."""
    generator = np.random.default_rng(0)
    return {name: jnp.array(generator.standard_normal(leaf.shape, dtype=np.float32)) for name, leaf in params.items()}


def carried(function: Callable[..., tuple[Any, Any]], carry: Any, *given: Any, repeats: float = 1.0) -> Contender:
    """A compiled function from a carry, which is donated, to the next one and something else."""
    start = time.perf_counter()
    # Donated buffers go to results of their shape in the order of both, so that each gets its own.
    compiled = jax.jit(function, donate_argnums=0).lower(carry, *given).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()

    def step() -> None:
        nonlocal carry
        carry, _ = jax.block_until_ready(compiled(carry, *given))

    return Contender(step, repeats, seconds, memory.temp_size_in_bytes if memory else None)


def zeros(shapes: Sequence[tuple[int, ...]]) -> dict[str, jax.Array]:
    """Parameters of these shapes, by name."""
    return {f"array_{i:04}": jnp.zeros(shape) for i, shape in enumerate(shapes)}
