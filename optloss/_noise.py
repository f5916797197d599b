"""Gradient noise: truncated normal, drawn by (key, step, name of the parameter)."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from optloss._axes import axes_along, block_of, check_param_specs, spec_leaves
from optloss._check import check_arity, check_choice, check_number, is_real, shape_of_call, shown
from optloss._names import parameter_names
from optloss._numerics import compute_dtype

__all__ = [
    "NOISE_GENERATORS",
    "GradientNoiseState",
    "NoiseScale",
    "add_gradient_noise",
    "check_key",
    "check_noise_scale",
    "indices",
    "mix_words",
    "scoped_key",
]

NoiseScale: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]

NOISE_GENERATORS = ("mixer", "threefry")


class GradientNoiseState(NamedTuple):
    """State of `add_gradient_noise`."""

    key: jax.Array  # shape=(2,), uint32: the data of a threefry key
    step: jax.Array  # shape=(), int32: the draws made so far, which is the step of the next one


def add_gradient_noise(
    scale: NoiseScale, key: ArrayLike, *, generator: str = "mixer", param_specs: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Adds truncated normal noise of constant scale to every gradient.

    Each step draws n afresh for each leaf, from N(0, 1) cut at two standard deviations:

        g' = g + scale * n,        std(g' - g) = 0.87963 * scale

    The draw depends on the key, on the number of the step and on the name of the parameter, and on nothing else: it
    is the same under every sharding, after a restart, and when other parameters come or go. It is drawn in float32
    and added in the gradient's dtype. Integer leaves get none.

    The generator is made for speed: a 32-bit mixer turns the index of each element into 24 random bits, and a rational
    function, right to 1e-6, turns these into the quantile. Its statistics are tested; it is not cryptographic, and its
    noise is no differential privacy.

    Args:
        scale: Factor of the noise, >= 0: a number, a scalar array, or a function of the step, which is the pipeline's
            `global_step` inside `optimize_loss` and the number of the draw elsewhere.
        key: Seed (an integer below 2**64), typed key as `jax.random.key(seed)` makes, or its data (uint32[2]).
        generator: "mixer", or "threefry" for `jax.random.truncated_normal`: more than ten times slower on a CPU.
        param_specs: Inside `shard_map`, the PartitionSpecs of the leaves, as its `in_specs` have them: a tree, or a
            prefix of one. A device then draws its own block of the noise of the whole array. None is whole arrays.

    Returns:
        A transformation whose state is a `GradientNoiseState`.

    Raises:
        ValueError: `scale` is negative or not finite; `key` is negative or too large; `generator` is unknown; inside
            `shard_map`, a leaf is cut along axes that `param_specs` does not name.
        TypeError: `scale`, `key` or `param_specs` is none of the above.

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
    check_param_specs(param_specs)
    add_noise = _add_mixed if check_choice("generator", generator, NOISE_GENERATORS) == "mixer" else _add_threefry

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
        words = jax.random.key_data(step_key)
        leaves, treedef = jax.tree.flatten(updates)
        names = parameter_names(updates)
        specs = spec_leaves(param_specs, updates) or [PartitionSpec()] * len(leaves)
        axes_along(names, leaves, specs)  # raises where they do not name all that differ
        noisy = [
            add_noise(leaf, words, jnp.asarray(_name_words(name)), factor, *_place(leaf, spec))
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
            for leaf, name, spec in zip(leaves, names, specs, strict=True)
        ]
        return jax.tree.unflatten(treedef, noisy), GradientNoiseState(state.key, optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_noise_scale(argument: str, scale: NoiseScale) -> None:
    """Raises what can be said of a scale before the first step."""
    if callable(scale):
        check_arity(argument, scale, ["global_step"])
        shape = shape_of_call(argument, scale, jax.ShapeDtypeStruct((), jnp.int32))
        if getattr(shape, "shape", None) != () or not is_real(shape.dtype):
            raise ValueError(f"{argument}: the function returns {shape}; a scalar would do.")
    else:
        check_number(argument, scale, at_least=0)


def check_key(argument: str, key: ArrayLike) -> None:
    """Raises a TypeError or ValueError where `key` cannot become a key. Makes no array."""
    if (
        isinstance(key, np.ndarray | jax.Array)
        and not isinstance(key, jax.core.Tracer)
        and key.shape == ()
        and jnp.issubdtype(key.dtype, jnp.integer)
    ):
        key = int(key)
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= int(key) < 2**64:
            raise ValueError(f"{argument}: got {shown(key)}; an integer from 0 to 2**64 - 1 would do.")
        return
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_seed = dtype is not None and not is_typed and jnp.issubdtype(dtype, jnp.integer)
    if not (is_typed and shape == ()) and not (is_seed and shape == ()) and not (dtype == jnp.uint32 and shape == (2,)):
        came = f"{dtype} of shape {shape}" if dtype is not None else f"{shown(key)} of type {type(key).__name__}"
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
    for word in _name_words(scope).tolist():
        scoped = jax.random.fold_in(scoped, word)
    return jax.random.key_data(scoped)


def _name_words(name: str) -> np.ndarray:
    """Two 32-bit words that stand for a name, the same in every process and release."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


_Shape: TypeAlias = tuple[int, ...]
_Start: TypeAlias = tuple[jax.Array, ...] | None


def _place(leaf: jax.Array, spec: PartitionSpec | None) -> tuple[_Shape, _Start]:
    """The shape of the whole array, and where in it the leaf starts; None where the leaf is the whole."""
    block = block_of(leaf, spec)
    return (leaf.shape, None) if block is None else block


def _add_threefry(
    leaf: jax.Array, words: jax.Array, name: jax.Array, factor: jax.Array, shape: _Shape, start: _Start
) -> jax.Array:
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, name[0]), name[1])
    noise = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    noise = noise if start is None else jax.lax.dynamic_slice(noise, start, leaf.shape)
    dtype = compute_dtype(leaf.dtype)
    return (leaf.astype(dtype) + factor.astype(dtype) * noise.astype(dtype)).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnums=4)  # leaves of one shape are traced once; a loop without jit is not slow
def _add_mixed(
    leaf: jax.Array, words: jax.Array, name: jax.Array, factor: jax.Array, shape: _Shape, start: _Start
) -> jax.Array:
    # The name's words are an array that meets the step's before it is taken apart: as scalars they would be folded into
    # the program, and every leaf would have a kernel of its own to compile.
    noise = _quantile(_mix(*indices(leaf, shape, start), mix_words(words ^ name)), factor.astype(jnp.float32))
    dtype = compute_dtype(leaf.dtype)
    return (leaf.astype(dtype) + noise.astype(dtype)).astype(leaf.dtype)


def indices(leaf: jax.Array, shape: _Shape, start: _Start) -> tuple[jax.Array, jax.Array]:
    """The place of each element in the row-major order of the whole, as low and high word, from iotas of its own shape.

    So each shard of an array makes its own; an index of the flattened array would be gathered.
    """
    sharding = jax.typeof(leaf).sharding
    given = {"out_sharding": sharding} if sharding.mesh.explicit_axes else {}
    low = high = jnp.zeros((), jnp.uint32)
    stride, high_stride = 1, 1
    for axis in reversed(range(leaf.ndim)):
        if shape[axis] > 2**32:
            raise ValueError(f"updates: got an array of shape {shape}; dimensions up to 2**32 would do.")
        if shape[axis] == 1:
            continue
        place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis, **given)
        if start is not None:
            place = place + jnp.asarray(start[axis]).astype(jnp.uint32)
        if stride * shape[axis] <= 2**32:
            low = low + place * np.uint32(stride)
            stride *= shape[axis]
        else:
            high = high + place * np.uint32(high_stride)
            high_stride *= shape[axis]
    return low, high


def mix_words(x: jax.Array) -> jax.Array:
    """Mixes the bits of each word; a bijection."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _mix(low: jax.Array, high: jax.Array, words: jax.Array) -> jax.Array:
    """32 random bits for each index.

    Each round has a word of the key, and the last multiplies by the number itself: a permutation of the indices, as
    constant multipliers make, would be seen to be too even from a few million numbers on.
    """
    x = low + words[0]
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = x + (words[1] + high * np.uint32(0x9E3779B1))
    y = (x ^ (x >> 15)) + words[0]
    y = y * y + x
    return y ^ (y >> 16)


def _quantile(bits: jax.Array, factor: jax.Array) -> jax.Array:
    """The normal quantile cut at two deviations, right to 9e-7, times `factor`: t * P(y) / Q(y) of the 24 upper bits.

    t is uniform on (-1, 1) and y = 1 / erf(sqrt(2))**2 - t**2, the distance to the quantile's pole: in it both
    polynomials are sums of positive terms. They are a minimax fit to sqrt(2) * erf_inv(erf(sqrt(2)) * t) / t.
    """
    t = ((bits.astype(jnp.int32) >> 8).astype(jnp.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    y = np.float32(1.0976108) - t * t
    # The division comes last: a last product would round with the sum that it goes into in some kernels, not in others.
    return factor * t * _polynomial(_NUMERATOR, y) / _polynomial(_DENOMINATOR, y)


_NUMERATOR = (17.804534, 37.97655, 10.298874, 0.3358074)
_DENOMINATOR = (1.4045519, 21.861345, 25.919386, 4.890621, 0.11494862)


def _polynomial(coefficients: tuple[float, ...], y: jax.Array) -> jax.Array:
    total = y * np.float32(coefficients[0])
    for coefficient in coefficients[1:-1]:
        total = (total + np.float32(coefficient)) * y
    return total + np.float32(coefficients[-1])
