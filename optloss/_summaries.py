"""Summaries under the original's tags: what was asked for -> a dict of scalars and histograms."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optloss._check import check_choice
from optloss._numerics import compute_dtype

__all__ = ["OPTIMIZER_SUMMARIES", "Histogram", "StepFigures", "Summaries", "check_summaries", "histogram", "summarize"]

OPTIMIZER_SUMMARIES = (
    "learning_rate",
    "loss",
    "gradients",
    "gradient_norm",
    "global_gradient_norm",
    "nonfinite_steps",
)
"""What `summaries` can ask for: the original's five, and the count of steps that were skipped."""

_DEFAULT_SUMMARIES = ("loss", "learning_rate", "global_gradient_norm")


class Histogram(NamedTuple):
    """A histogram with the fields of TensorFlow's, on the device."""

    min: jax.Array  # shape=(), float32
    max: jax.Array  # shape=(), float32
    num: jax.Array  # shape=(), int32: how many values
    sum: jax.Array  # shape=(), float32
    sum_squares: jax.Array  # shape=(), float32
    bucket_limit: jax.Array  # shape=(1551,), float32: upper ends; a bucket is without its own
    bucket: jax.Array  # shape=(1551,), int32: how many values in each


Summaries = dict[str, jax.Array | Histogram]


class StepFigures(NamedTuple):
    """What a step has computed anyway and summaries are made of."""

    loss: jax.Array | None
    learning_rate: jax.Array | None  # after its decay; None without a decay
    names: list[str]
    gradients: list[jax.Array]  # clipped
    gradient_norms: jax.Array  # of the clipped gradients
    norm: jax.Array  # before clipping
    clipped_norm: jax.Array | None  # None without clipping
    max_norm: jax.Array | None  # the adaptive limit, where it is reported
    nonfinite_steps: jax.Array


def check_summaries(summaries: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the summaries asked for; raises a ValueError where one is not known, as the original did."""
    if summaries is None:
        return _DEFAULT_SUMMARIES
    if isinstance(summaries, str) or not isinstance(summaries, Sequence | set | frozenset):
        raise ValueError(
            f"summaries: got {summaries!r} of type {type(summaries).__name__}; a list of names from "
            f"OPTIMIZER_SUMMARIES, [{', '.join(OPTIMIZER_SUMMARIES)}], would do."
        )
    return tuple(check_choice("summaries", summary, OPTIMIZER_SUMMARIES) for summary in summaries)


def summarize(asked: tuple[str, ...], scope: str, figures: StepFigures) -> Summaries:
    """Returns the summaries of a step, in float32, under `scope`/tag."""
    tags: dict[str, Any] = {}
    if "learning_rate" in asked:
        tags["learning_rate"] = figures.learning_rate
    if "loss" in asked:
        tags["loss"] = figures.loss
    if "nonfinite_steps" in asked:
        tags["nonfinite_steps"] = figures.nonfinite_steps
    if "gradient_norm" in asked or "global_gradient_norm" in asked:
        tags["global_norm/gradient_norm"] = figures.norm
        tags["global_norm/clipped_gradient_norm"] = figures.clipped_norm
    tags["global_norm/adaptive_max_gradient_norm"] = figures.max_norm
    if "gradient_norm" in asked:
        for i, name in enumerate(figures.names):
            tags[f"gradient_norm/{name}"] = figures.gradient_norms[i]
    if "gradients" in asked:
        for name, gradient in zip(figures.names, figures.gradients, strict=True):
            tags[f"gradients/{name}"] = histogram(gradient)
    return {
        f"{scope}/{tag}": value if isinstance(value, Histogram) else jnp.asarray(value).astype(jnp.float32)
        for tag, value in tags.items()
        if value is not None
    }


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
    if mesh.explicit_axes:  # neither a search nor a scatter has a rule for them
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        sharded = jax.sharding.auto_axes(_histogram, axes=mesh.explicit_axes, out_sharding=everywhere)
        return Histogram(*sharded(values))
    return _histogram(values)


def _histogram(values: jax.Array) -> Histogram:
    limits = jnp.asarray(_bucket_limits())
    flat = jnp.ravel(values).astype(compute_dtype(values.dtype))
    finite = jnp.isfinite(flat)
    counted = jnp.where(finite, flat, 0).astype(jnp.float32)
    places = jnp.minimum(jnp.searchsorted(limits, counted, side="right"), len(limits) - 1)  # the last has its own end
    bucket = jnp.zeros(limits.shape, jnp.int32).at[places].add(finite.astype(jnp.int32))
    return Histogram(
        min=jnp.min(jnp.where(finite, counted, jnp.inf), initial=jnp.inf),
        max=jnp.max(jnp.where(finite, counted, -jnp.inf), initial=-jnp.inf),
        num=jnp.sum(finite, dtype=jnp.int32),
        sum=jnp.sum(counted),
        sum_squares=jnp.sum(counted * counted),
        bucket_limit=limits,
        bucket=bucket,
    )


def _bucket_limits() -> np.ndarray:
    limits = [1e-12]
    while limits[-1] * 1.1 < 1e20:
        limits.append(limits[-1] * 1.1)
    limits.append(float(np.finfo(np.float32).max))
    return np.asarray([*(-limit for limit in reversed(limits)), 0.0, *limits], np.float32)
