"""Summaries under the original's tags: what was asked for -> a dict of scalars and histograms."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optloss._axes import AxisNames
from optloss._check import check_choice, shown
from optloss._histogram import Histogram, histogram_of_parts

__all__ = ["OPTIMIZER_SUMMARIES", "StepFigures", "Summaries", "check_summaries", "summarize"]

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


Summaries = dict[str, jax.Array | Histogram]


class StepFigures(NamedTuple):
    """What a step has computed anyway and summaries are made of."""

    loss: jax.Array | None
    learning_rate: jax.Array | None  # after its decay; None without a decay
    names: list[str]
    gradients: list[jax.Array]  # clipped
    along: list[AxisNames]  # the axes along which each is cut
    gradient_norms: list[jax.Array]  # of the clipped gradients
    norm: jax.Array  # before clipping
    clipped_norm: jax.Array | None  # None without clipping
    max_norm: jax.Array | None  # the adaptive limit, where it is reported
    nonfinite_steps: jax.Array


def check_summaries(summaries: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the summaries asked for; raises a ValueError where one is not known, as the original did."""
    if summaries is None:
        return _DEFAULT_SUMMARIES
    if isinstance(summaries, str | bytes) or not isinstance(summaries, Sequence | set | frozenset):
        raise ValueError(
            f"summaries: got {shown(summaries)} of type {type(summaries).__name__}; a list of names from "
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
        for name, norm in zip(figures.names, figures.gradient_norms, strict=True):
            tags[f"gradient_norm/{name}"] = norm
    if "gradients" in asked:
        for name, gradient, axes in zip(figures.names, figures.gradients, figures.along, strict=True):
            tags[f"gradients/{name}"] = histogram_of_parts(gradient, axes)
    return {
        f"{scope}/{tag}": value if isinstance(value, Histogram) else jnp.asarray(value).astype(jnp.float32)
        for tag, value in tags.items()
        if value is not None
    }
