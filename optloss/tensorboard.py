"""Summaries into TensorBoard, through whatever writer the user brings."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.typing import ArrayLike

from optloss._histogram import Histogram

__all__ = ["write_summaries"]


class _Writer(Protocol):
    """What a writer has to have; a `tensorboardX.SummaryWriter` has it."""

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> Any: ...

    def add_histogram_raw(self, tag: str, *args: Any, **kwargs: Any) -> Any: ...


def write_summaries(writer: _Writer, summaries: Mapping[str, ArrayLike | Histogram], step: ArrayLike) -> None:
    """Writes the summaries of one step, after one transfer from the device.

    Scalars are written as they are, NaN and infinity too. Of a histogram's buckets the filled ones are written and, for
    each run of empty ones below one of them, a single empty bucket; a histogram without values is left out.

    Args:
        writer: Anything with `add_scalar(tag, value, step)` and `add_histogram_raw(tag, min=, max=, num=, sum=,
            sum_squares=, bucket_limits=, bucket_counts=, global_step=)`, such as a `tensorboardX.SummaryWriter`.
        summaries: `output.summaries` of a step. Of stacked ones, as `jax.lax.scan` gives, fetch all first and write one
            step after the other: `jax.tree.map(lambda values: values[i], jax.device_get(summaries))`.
        step: The step to write under, an integer.

    Raises:
        ValueError: The summaries are those of several steps.

    Example:
        >>> from optloss import tensorboard
        >>> class PrintingWriter:
        ...     def add_scalar(self, tag, value, step):
        ...         print(step, tag, value)
        ...
        ...     def add_histogram_raw(self, tag, *, global_step, num, bucket_counts, **fields):
        ...         print(global_step, tag, num, bucket_counts)
        >>> gradients = optloss.histogram(jnp.array([1.0, 1.0, 3.0]))
        >>> tensorboard.write_summaries(PrintingWriter(), {"loss": jnp.float32(0.5), "gradients/w": gradients}, step=7)
        7 loss 0.5
        7 gradients/w 3.0 [0.0, 2.0, 0.0, 1.0]

    TF1 left serialized summaries in a collection of the graph, for a `FileWriter` that ran with the step. It kept one
    empty bucket above the last filled one, too, which TensorBoard does not draw.
    """
    fetched: tuple[dict[str, Any], Any] = jax.device_get((dict(summaries), step))
    values, at = fetched[0], int(fetched[1])
    for tag in summaries:
        value = values[tag]
        shape = np.shape(value.num if isinstance(value, Histogram) else value)
        if shape:
            raise ValueError(
                f"summaries: {tag!r} has the shape {shape}, that of several steps; one step of them, "
                "jax.tree.map(lambda values: values[i], summaries), would do."
            )
        if not isinstance(value, Histogram):
            writer.add_scalar(tag, float(value), at)
        elif np.any(value.bucket):
            writer.add_histogram_raw(tag, **_fields(value), global_step=at)


def _fields(histogram: Histogram) -> dict[str, Any]:
    """The fields of a histogram as Python numbers, as protocol buffers want them, with the buckets worth writing."""
    filled = np.asarray(histogram.bucket) > 0
    written = filled | np.append(filled[1:], False)
    return {
        "min": float(histogram.min),
        "max": float(histogram.max),
        "num": float(histogram.num),
        "sum": float(histogram.sum),
        "sum_squares": float(histogram.sum_squares),
        "bucket_limits": np.asarray(histogram.bucket_limit, np.float64)[written].tolist(),
        "bucket_counts": np.asarray(histogram.bucket, np.float64)[written].tolist(),
    }
