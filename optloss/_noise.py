"""Gradient noise: truncated normal, drawn by (key, step, name of the parameter)."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optloss._check import check_arity, check_number, shape_of_call
from optloss._names import parameter_names
from optloss._numerics import compute_dtype

__all__ = ["GradientNoiseState", "NoiseScale", "add_gradient_noise", "check_key", "check_noise_scale", "scoped_key"]

NoiseScale: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]


class GradientNoiseState(NamedTuple):
    """State of `add_gradient_noise`."""

    key: jax.Array  # shape=(2,), uint32: the data of a threefry key
    step: jax.Array  # shape=(), int32: the draws made so far, which is the step of the next one


def add_gradient_noise(scale: NoiseScale, key: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Adds truncated normal noise of constant scale to every gradient.

    Each step draws n afresh for each leaf, from N(0, 1) cut at two standard deviations:

        g' = g + scale * n,        std(g' - g) = 0.87963 * scale

    The draw depends on the key, on the number of the step and on the name of the parameter, and on nothing else: it
    is the same under every sharding, after a restart, and when other parameters come or go. It is drawn in float32
    and added in the gradient's dtype. Integer leaves get none.

    Args:
        scale: Factor of the noise, >= 0: a number, a scalar array, or a function of the step, which is the pipeline's
            `global_step` inside `optimize_loss` and the number of the draw elsewhere.
        key: Seed (an integer below 2**64), typed key as `jax.random.key(seed)` makes, or its data (uint32[2]).

    Returns:
        A transformation whose state is a `GradientNoiseState`.

    Raises:
        ValueError: `scale` is negative or not finite; `key` is negative or too large.
        TypeError: `scale` or `key` is none of the above.

    Example:
        >>> noise = optloss.add_gradient_noise(0.01, key=0)
        >>> gradients = {"w": jnp.zeros(3)}
        >>> noisy, state = noise.update(gradients, noise.init(gradients))
        >>> bool(jnp.all(jnp.abs(noisy["w"]) <= 0.02)), int(state.step)
        (True, 1)

    TF1 added the same noise to float32 gradients and refused other dtypes. Unlike `optax.add_noise`, nothing is
    annealed, `scale` is a factor and not a variance, and the draw of a leaf does not hang on its place in the tree.

    Reference:
        Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks, 2015. The noise is there to
        help training; it is added before clipping and gives no differential privacy.
    """
    check_noise_scale("scale", scale)
    check_key("key", key)

    def init_fn(params: optax.Params) -> GradientNoiseState:
        del params
        return GradientNoiseState(_noise_key(key), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: GradientNoiseState,
        params: optax.Params | None = None,
        *,
        global_step: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientNoiseState]:
        del params, extra_args
        step = state.step if global_step is None else global_step
        factor = jnp.asarray(scale(step) if callable(scale) else scale)
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.step)
        leaves, treedef = jax.tree.flatten(updates)
        noisy = [
            _add_noise(leaf, name, factor, step_key)
            for leaf, name in zip(leaves, parameter_names(updates), strict=True)
        ]
        return jax.tree.unflatten(treedef, noisy), GradientNoiseState(state.key, optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_noise_scale(argument: str, scale: NoiseScale) -> None:
    """Raises what can be said of a scale before the first step."""
    if callable(scale):
        check_arity(argument, scale, ["global_step"])
        shape = shape_of_call(argument, scale, jax.ShapeDtypeStruct((), jnp.int32))
        if getattr(shape, "shape", None) != () or not jnp.issubdtype(shape.dtype, jnp.number):
            raise ValueError(f"{argument}: the function returns {shape}; a scalar would do.")
    else:
        check_number(argument, scale, at_least=0)


def check_key(argument: str, key: ArrayLike) -> None:
    """Raises a TypeError or ValueError where `key` cannot become a key. Makes no array."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= int(key) < 2**64:
            raise ValueError(f"{argument}: got {key!r}; an integer from 0 to 2**64 - 1 would do.")
        return
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_seed = dtype is not None and not is_typed and jnp.issubdtype(dtype, jnp.integer)
    if not (is_typed and shape == ()) and not (is_seed and shape == ()) and not (dtype == jnp.uint32 and shape == (2,)):
        came = f"{dtype} of shape {shape}" if dtype is not None else f"{key!r} of type {type(key).__name__}"
        raise TypeError(f"{argument}: got {came}; an integer, one typed key or its data (uint32[2]) would do.")


def _noise_key(key: ArrayLike) -> jax.Array:
    """Returns the data of the threefry key that `key` stands for; an integer gives that of `jax.random.key`."""
    if isinstance(key, int | np.integer):
        # Both words: jax.random.key drops the high one where x64 is off.
        return jnp.asarray(np.array([int(key) >> 32, int(key) & 0xFFFFFFFF], np.uint32))
    key = jnp.array(key, copy=True)  # the state may be donated, and the caller's key must not be
    if key.shape == (2,):
        return key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key(key, impl="threefry2x32")
    data = jax.random.key_data(key)
    return data if data.shape == (2,) else jax.random.bits(key, (2,), jnp.uint32)


def scoped_key(key: ArrayLike, scope: str) -> jax.Array:
    """Returns the data of a key for one train op, so that two that share a seed do not share their noise."""
    scoped = jax.random.wrap_key_data(_noise_key(key), impl="threefry2x32")
    for word in _name_words(scope):
        scoped = jax.random.fold_in(scoped, word)
    return jax.random.key_data(scoped)


def _add_noise(leaf: jax.Array, name: str, factor: jax.Array, step_key: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    key = step_key
    for word in _name_words(name):
        key = jax.random.fold_in(key, word)
    noise = jax.random.truncated_normal(key, -2.0, 2.0, leaf.shape, jnp.float32)
    dtype = compute_dtype(leaf.dtype)
    return (leaf.astype(dtype) + factor.astype(dtype) * noise.astype(dtype)).astype(leaf.dtype)


def _name_words(name: str) -> list[int]:
    """Two 32-bit words that stand for a name, the same in every process and release."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]
