"""A checksum for each array of a tree, to be kept beside a checkpoint."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optloss._names import parameter_names
from optloss._noise import indices, mix_words

__all__ = ["checksums"]


def checksums(tree: Any) -> dict[str, str]:
    """Returns a checksum of each array by its name: kept beside a checkpoint, it tells whether a bit was flipped.

    With b the bits of an array as words of 32 bits and mix a bijection of such words,

        checksum = sum over i of mix(b[i] ^ mix(i))        modulo 2**32

    and another such sum, with other constants. So a change of one word, whatever it is, always changes both, and a
    change of several is missed once in 2**64 by chance. It is no signature: who can write the array can write a
    checksum for it.

    It is computed where the array lies, is the same under every sharding and in several processes, and is the same for
    NumPy's arrays. What comes back is a few bytes for each.

    Args:
        tree: Any tree of arrays and numbers: a `TrainState`, or what a checkpoint restored of it.

    Returns:
        `{name: "dtype[shape] sums"}`; a name is the "/"-joined path of the array, which does not hang on whether a
        checkpoint turned a NamedTuple into a dict.

    Raises:
        ValueError: Two arrays have one name.
        TypeError: A leaf is no array of numbers.

    Example:
        >>> before = optloss.checksums({"w": jnp.array([1.0, 2.0])})
        >>> before
        {'w': 'float32[2] 3a5814e4158c5384'}
        >>> optloss.checksums({"w": jnp.array([1.0, -2.0])}) == before
        False

    TF1's checkpoints had a CRC in the file. Optax has none, and neither have most of Orbax's formats.
    """
    names, leaves = parameter_names(tree), jax.tree.leaves(tree)
    sums = jax.device_get([_sums_of(name, leaf) for name, leaf in zip(names, leaves, strict=True)])
    return {
        name: f"{_dtype(leaf)}[{','.join(map(str, np.shape(leaf)))}] {first:08x}{second:08x}"
        for name, leaf, (first, second) in zip(names, leaves, sums, strict=True)
    }


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _sums_of(name: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return _sums_of_array(jax.random.key_data(leaf) if is_key else leaf)
    array = np.asarray(leaf)
    size = array.dtype.itemsize
    if array.dtype.kind in "OSUMm" or size not in (1, 2, 4, 8, 16):
        raise TypeError(f"tree: {name!r} is of type {type(leaf).__name__} and {array.dtype}; numbers would do.")
    array = np.ascontiguousarray(array).reshape(array.shape)
    # As words already, of which an element of 64 bits has two: JAX would round it.
    return _sums_of_array(array.view(f"u{size}") if size < 8 else array[..., None].view(np.uint32))


@jax.jit
def _sums_of_array(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    words = _words(array)
    low, high = indices(words, words.shape, None)
    place = mix_words(low) + high * np.uint32(0x9E3779B1)
    first = mix_words(words ^ place)
    second = mix_words(first + mix_words(place + np.uint32(0x85EBCA6B)))
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of an array as words of 32."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == bool:
        return array.astype(jnp.uint32)
    bits = min(32, 8 * array.dtype.itemsize)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
