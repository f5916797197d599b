"""What a call of a step of four small arrays costs in Python, and in a scan."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax_contenders import CLIP, MULTIPLIER, NOISE, RATE, optax_chain
from workers import Contender

import optloss

__all__ = ["bare_call", "bare_list_call", "optax_call", "optax_scan", "optloss_call", "optloss_scan"]

Update = Callable[[Any, Any], tuple[Any, Any]]


def optloss_call(calls: int) -> Contender:
    """Calls of `update`."""
    train, state = optloss_train()
    return _calls(train.update, state, calls)


def optax_call(calls: int) -> Contender:
    """Calls of a jitted step with the chain."""
    update, state = optax_train()
    return _calls(jax.jit(update, donate_argnums=0), state, calls)


def bare_call(calls: int) -> Contender:
    """Calls of a jitted function of the same state and results that adds 1."""
    state, output = _signature()
    return _calls(_adder(output), state, calls)


def bare_list_call(calls: int) -> Contender:
    """The same with lists of the same arrays."""
    state, output = map(jax.tree.leaves, _signature())
    return _calls(_adder(output), state, calls)


def optloss_scan(steps: int, calls: int) -> Contender:
    """Steps of a scan of `update`."""
    train, state = optloss_train()
    return _scans(train.update, state, steps, calls)


def optax_scan(steps: int, calls: int) -> Contender:
    """Steps of a scan of the chain's step."""
    update, state = optax_train()
    return _scans(update, state, steps, calls)


def optloss_train() -> tuple[optloss.TrainOp, optloss.TrainState]:
    """The train op and its first state."""
    train = optloss.optimize_loss(
        loss,
        0,
        RATE,
        "Adam",
        gradient_noise_scale=NOISE,
        gradient_multipliers={"*/kernel": MULTIPLIER},
        clip_gradients=CLIP,
    )
    return train, train.init(parameters(), key=0)


def optax_train() -> tuple[Update, Any]:
    """The chain's step and its first state."""
    chain = optax_chain({layer: {"kernel": True, "bias": False} for layer in parameters()})

    def update(state: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        params, chain_state = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, chain_state = chain.update(gradients, chain_state, params)
        return (optax.apply_updates(params, updates), chain_state), value

    params = parameters()
    return update, (params, chain.init(params))


def parameters() -> dict[str, dict[str, jax.Array]]:
    """Two dense layers."""
    layers = {"dense_0": (4, 8), "dense_1": (8, 1)}
    return {name: {"kernel": jnp.full(shape, 0.1), "bias": jnp.zeros(shape[-1:])} for name, shape in layers.items()}


def loss(params: Any, batch: jax.Array) -> jax.Array:
    """The mean square of the network's output."""
    hidden = jnp.tanh(batch @ params["dense_0"]["kernel"] + params["dense_0"]["bias"])
    return jnp.mean(jnp.square(hidden @ params["dense_1"]["kernel"] + params["dense_1"]["bias"]))


def _signature() -> tuple[Any, Any]:
    """The state, and the shapes of the output, of a call of `update`."""
    train, state = optloss_train()
    return state, jax.eval_shape(train.update, state, _batch())[1]


def _adder(output: Any) -> Update:
    def update(state: Any, batch: jax.Array) -> tuple[Any, Any]:
        del batch
        added = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state)
        return added, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), output)

    jitted: Update = jax.jit(update, donate_argnums=0)
    return jitted


def _batch() -> jax.Array:
    return jnp.ones((8, 4))


def _calls(update: Update, state: Any, calls: int, steps: int = 1, batch: jax.Array | None = None) -> Contender:
    """Seconds a step, of calls that do not wait for one another's results."""
    batch = _batch() if batch is None else batch

    def step() -> None:
        nonlocal state
        for _ in range(calls):
            state, _ = update(state, batch)
        jax.block_until_ready(state)

    return Contender(step, repeats=calls * steps)


def _scans(update: Update, state: Any, steps: int, calls: int) -> Contender:
    scan = jax.jit(lambda state, batches: jax.lax.scan(update, state, batches), donate_argnums=0)
    return _calls(scan, state, calls, steps, jnp.broadcast_to(_batch(), (steps, 8, 4)))
