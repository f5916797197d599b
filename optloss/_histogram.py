"""Histograms over TensorFlow's buckets, counted on the device without a search or a sort."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optloss._axes import AxisNames
from optloss._numerics import compute_dtype

__all__ = ["Histogram", "histogram"]

_BLOCK = 1 << 18  # values that are counted at a time on a CPU: what is worked out of them stays in its cache
_CELL_BITS = 19  # of a float32's mantissa; 4 are left, and a cell ends at most 1/16 above its start


class Histogram(NamedTuple):
    """A histogram with the fields of TensorFlow's, on the device."""

    min: jax.Array  # shape=(), float32
    max: jax.Array  # shape=(), float32
    num: jax.Array  # shape=(), int32: how many values
    sum: jax.Array  # shape=(), float32
    sum_squares: jax.Array  # shape=(), float32
    bucket_limit: jax.Array  # shape=(1551,), float32: upper ends; a bucket is without its own
    bucket: jax.Array  # shape=(1551,), int32: how many values in each


def histogram(values: jax.Array) -> Histogram:
    """Returns the histogram of an array over TensorFlow's buckets.

    The limits grow by a tenth from 1e-12 to 1e20 on either side of 0. Values that are not finite are left out.

    Args:
        values: Real array of any shape.

    Example:
        >>> h = optloss.histogram(jnp.array([-1.0, 0.5, 2.0]))
        >>> int(h.num), float(h.sum), int(h.bucket.sum())
        (3, 1.5, 3)

    TensorFlow's summary keeps only the buckets around those that are filled; here the shape must not hang on the
    values. `jnp.histogram` has evenly spaced bins and fails on explicitly sharded arrays.
    """
    mesh = jax.typeof(values).sharding.mesh
    if mesh.explicit_axes:  # a scatter has no rule for them
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        sharded = jax.sharding.auto_axes(_histogram, axes=mesh.explicit_axes, out_sharding=everywhere)
        return Histogram(*sharded(values))
    return Histogram(*_histogram(values))


def histogram_of_parts(values: jax.Array, axes: AxisNames) -> Histogram:
    """The histogram of an array that is cut along axes of a `shard_map`, from its parts."""
    part = histogram(values)
    if not axes:
        return part
    added = ("num", "sum", "sum_squares", "bucket")
    totals = dict(zip(added, jax.lax.psum([getattr(part, field) for field in added], axes), strict=True))
    return part._replace(min=jax.lax.pmin(part.min, axes), max=jax.lax.pmax(part.max, axes), **totals)


@jax.jit  # also where the caller has none: one program, and constants on all devices of the mesh
def _histogram(values: jax.Array) -> Histogram:
    histogram: Histogram = jax.lax.platform_dependent(values, cpu=_count_on_cpu, default=_count)
    return histogram


def _count_on_cpu(values: jax.Array) -> Histogram:
    # Several devices may each have a part, and a block would have to be gathered from them.
    if jax.device_count() > 1 or not _BLOCK < values.size < 2**31:
        return _count(values, _figures_on_cpu)
    flat = jnp.ravel(values).astype(compute_dtype(values.dtype))

    def count_block(start: jax.Array) -> Histogram:
        at = jnp.minimum(start, flat.size - _BLOCK)  # the last block overlaps the one before it
        block = jax.lax.dynamic_slice(flat, (at,), (_BLOCK,))
        new = at + jnp.arange(_BLOCK, dtype=jnp.int32) >= start
        return _count(jnp.where(new, block, jnp.nan), _figures_on_cpu)

    blocks = jax.lax.map(count_block, jnp.arange(0, flat.size, _BLOCK, dtype=jnp.int32))
    return Histogram(
        min=jnp.min(blocks.min),
        max=jnp.max(blocks.max),
        num=jnp.sum(blocks.num, dtype=jnp.int32),
        sum=jnp.sum(blocks.sum),
        sum_squares=jnp.sum(blocks.sum_squares),
        bucket_limit=jnp.asarray(_bucket_limits()),
        bucket=jnp.sum(blocks.bucket, axis=0, dtype=jnp.int32),
    )


def _figures(values: jax.Array, where: jax.Array | None = None) -> tuple[jax.Array, ...]:
    narrow = values.astype(jnp.float32)
    return (
        jnp.min(narrow, where=where, initial=jnp.inf),
        jnp.max(narrow, where=where, initial=-jnp.inf),
        jnp.sum(narrow, where=where),
        jnp.sum(narrow * narrow, where=where),
    )


def _finite_figures(values: jax.Array, skipped: jax.Array | None = None) -> tuple[jax.Array, ...]:
    del skipped
    return _figures(values, jnp.isfinite(values))


def _figures_on_cpu(values: jax.Array, skipped: jax.Array) -> tuple[jax.Array, ...]:
    # Masked, each figure is first written out as an array; a branch costs a GPU more than the masks.
    figures: tuple[jax.Array, ...] = jax.lax.cond(skipped == 0, _figures, _finite_figures, values)
    return figures


def _count(values: jax.Array, figures: Callable[..., tuple[jax.Array, ...]] = _finite_figures) -> Histogram:
    """The histogram in one go, in the shape the values have: to flatten them would gather what is sharded."""
    wide = values.astype(compute_dtype(values.dtype))
    limits = jnp.asarray(_bucket_limits())
    places = jnp.where(jnp.isfinite(wide), _places(wide.astype(jnp.float32)), limits.size)  # one past the buckets
    counts = jnp.zeros(limits.size + 1, jnp.int32).at[places].add(1, mode="promise_in_bounds")
    bucket = counts[:-1]
    smallest, largest, total, total_squares = figures(wide, counts[-1])
    return Histogram(
        min=smallest,
        max=largest,
        num=jnp.sum(bucket, dtype=jnp.int32),
        sum=total,
        sum_squares=total_squares,
        bucket_limit=limits,
        bucket=bucket,
    )


def _places(values: jax.Array) -> jax.Array:
    """Returns the bucket that each float32 is in, without a search: a lookup and integer arithmetic.

    The bits of a positive float, read as an integer, grow with it. All but the last 19 are the number of a cell, in
    which there is one limit at most; its entry is such that adding the last 19 carries from the limit on.

    Below 0, -b <= x < -a is a < |x| <= b: the bucket of the float before |x|, counted down from 0.
    """
    first, cells = _cells()
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    ordered = jnp.where(bits < 0, -(2**31) - bits, bits)  # -0.0 is 0
    sign = ordered >> 31  # -1 below 0, otherwise 0
    inside = jnp.clip((ordered ^ sign) - first, 0, (cells.size << _CELL_BITS) - 1)
    cell = jnp.asarray(cells).at[inside >> _CELL_BITS].get(mode="promise_in_bounds")
    limits_passed = (cell + (inside & (1 << _CELL_BITS) - 1)) >> _CELL_BITS
    return len(_bucket_limits()) // 2 + 1 + (limits_passed ^ sign)


@functools.cache
def _cells() -> tuple[int, np.ndarray]:
    """Returns the bits at which the cells start and, of each cell, the limits before it and how far its own is."""
    limits = _bucket_limits()
    bits = limits[limits > 0][:-1].view(np.int32)  # the last bucket has its own end
    size = 1 << _CELL_BITS
    starts = np.arange(bits[0] // size * size, bits[-1] + 1, size)
    passed = np.searchsorted(bits, starts, side="right")
    to_limit = np.minimum(np.append(bits, np.iinfo(np.int32).max)[passed] - starts, size)
    return int(starts[0]), ((passed + 1) * size - to_limit).astype(np.int32)


@functools.cache
def _bucket_limits() -> np.ndarray:
    limits = [1e-12]
    while limits[-1] * 1.1 < 1e20:
        limits.append(limits[-1] * 1.1)
    limits.append(float(np.finfo(np.float32).max))
    return np.asarray([*(-limit for limit in reversed(limits)), 0.0, *limits], np.float32)
