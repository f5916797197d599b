"""A picture of a run: loss, learning rate, gradient norms, and how many steps were clipped or skipped."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise ImportError("optloss.pictures: pip install 'optloss[pictures]' would do.") from error

__all__ = ["draw_run"]


def draw_run(
    history: Mapping[str, ArrayLike] | Sequence[Mapping[str, ArrayLike]],
    steps: ArrayLike | None = None,
    *,
    name: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws a run from the history of its summaries.

    There is a panel for the loss, for the learning rate, for the global norm before and after clipping with the
    adaptive limit, and for the share of clipped steps with the number of skipped ones: each where the summaries have
    it. Curves of many points are drawn pale, with their moving average.

    Args:
        history: The summaries of a step after the other, as an `AsyncWriter` hands them to `history.append`; or a
            dict of arrays of shape (steps,), as `jax.lax.scan` stacks them.
        steps: The step of each, an array of shape (steps,); None is 0, 1, 2, ...
        name: The op's, where the history has those of several.
        figure: Where to draw, an empty one; None makes one.

    Returns:
        The figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: The history is empty, or has no figure of `name`; `name` is None and it has several ops'; shapes
            differ.

    Example:
        >>> from optloss import pictures
        >>> train = optloss.optimize_loss(lambda w: w**2, 0, 0.1, "SGD", clip_gradients=1.0)
        >>> state, history = train.init(2.0), []
        >>> for _ in range(20):
        ...     state, out = train.update(state)
        ...     history.append(out.summaries)
        >>> figure = pictures.draw_run(history)
        >>> [panel.get_ylabel() for panel in figure.axes]
        ['loss', 'gradient norm', 'clipped steps']

    TF1 left this to TensorBoard. The panel of skipped steps needs the summary "nonfinite_steps".
    """
    values, at = _columns(history, steps, name)
    panels = [(draw, have) for draw, have in _PANELS if any(tag in values for tag in have)]
    if figure is None:
        rows = (len(panels) + 1) // 2
        figure = Figure(figsize=(11, 1 + 3.2 * rows), layout="constrained")
    places = figure.subplots((len(panels) + 1) // 2, min(2, len(panels)), squeeze=False).flat
    for (draw, _), place in zip(panels, places, strict=False):  # panels first: what is left of places stays
        draw(place, values, at)
        place.set_xlabel("step")
        place.margins(x=0.01)
        place.grid(alpha=0.3)
        if place.get_legend_handles_labels()[0]:
            place.legend(loc="best", fontsize="small")
    for place in places:
        place.remove()
    return figure


_BEFORE, _AFTER = "global_norm/gradient_norm", "global_norm/clipped_gradient_norm"
_LIMIT, _SKIPPED = "global_norm/adaptive_max_gradient_norm", "nonfinite_steps"


def _columns(history: Any, steps: Any, name: str | None) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
    """The scalars of one op by their tags without its name, each with a value a step, and the steps."""
    rows = history if isinstance(history, Mapping) else [*history]
    if not rows:
        raise ValueError("history: got an empty one; the summaries of a step at least would do.")
    tags = rows if isinstance(rows, Mapping) else rows[0]
    endings = ("/loss", "/learning_rate", f"/{_BEFORE}", f"/{_SKIPPED}")
    whole = [tag for tag in tags if "/gradient_norm/" not in tag and "/gradients/" not in tag]
    names = sorted({tag.removesuffix(end) for tag in whole for end in endings if tag.endswith(end)})
    if name is None and len(names) > 1:
        raise ValueError(f"name: got None, and the history has those of {names}; one of them would do.")
    if not names or name not in (None, *names):
        raise ValueError(f"history: got the tags {sorted(tags)}, none of which can be drawn for the name {name!r}.")
    scope = f"{name or names[0]}/"
    asked = {tag: tag.removeprefix(scope) for tag in tags if tag.startswith(scope)}
    columns = {
        short: np.asarray(rows[tag] if isinstance(rows, Mapping) else [row[tag] for row in rows], np.float64)
        for tag, short in asked.items()
        if short in ("loss", "learning_rate", _BEFORE, _AFTER, _LIMIT, _SKIPPED)
    }
    count = len(next(iter(columns.values())))
    at = np.arange(count) if steps is None else np.asarray(steps)
    for tag, column in {**columns, "steps": at}.items():
        if column.shape != (count,):
            raise ValueError(f"history: {tag!r} has the shape {column.shape}, where ({count},) would do.")
    return columns, at


def _draw_loss(axes: Axes, values: dict[str, Any], at: Any) -> None:
    _draw_curve(axes, at, values["loss"], "tab:blue", "loss")
    axes.set_ylabel("loss")


def _draw_rate(axes: Axes, values: dict[str, Any], at: Any) -> None:
    axes.plot(at, values["learning_rate"], "tab:green")
    axes.set_ylabel("learning rate")


def _draw_norms(axes: Axes, values: dict[str, Any], at: Any) -> None:
    before, after = values[_BEFORE], values.get(_AFTER)
    if after is None:
        _draw_curve(axes, at, before, "tab:blue", "before clipping")
    else:
        cut = np.flatnonzero(_is_clipped(before, after))
        _draw_curve(axes, at, after, "tab:blue", "after clipping" if len(cut) else "gradients")
        axes.vlines(at[cut], after[cut], before[cut], "tab:red", lw=0.8, alpha=0.6)
        axes.plot(at[cut], before[cut], "v", color="tab:red", ms=3, label="before, where clipped")
    if _LIMIT in values:
        axes.plot(at, values[_LIMIT], "tab:orange", lw=1.2, label="adaptive limit")
    _scale(axes, before)
    axes.set_ylabel("gradient norm")


def _draw_counts(axes: Axes, values: dict[str, Any], at: Any) -> None:
    if _AFTER in values:
        clipped = _is_clipped(values[_BEFORE], values[_AFTER])
        width = max(1, len(at) // 20)
        axes.plot(at, _moving_average(clipped.astype(float), width), "tab:red", label=f"of {width} steps around")
        axes.axhline(clipped.mean(), color="tab:red", ls=":", label=f"of all: {100 * clipped.mean():.1f} %")
    if _SKIPPED in values:
        count = values[_SKIPPED]
        skipped = at[np.flatnonzero(np.diff(count, prepend=0) > 0)]
        axes.vlines(skipped, 0, 1, "tab:gray", lw=1, label=f"skipped: {count[-1]:.0f}")
    axes.set(ylabel="clipped steps" if _AFTER in values else "skipped steps", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


_PANELS = (
    (_draw_loss, ("loss",)),
    (_draw_rate, ("learning_rate",)),
    (_draw_norms, (_BEFORE,)),
    (_draw_counts, (_AFTER, _SKIPPED)),
)


def _is_clipped(before: Any, after: Any) -> Any:
    """By more than rounding: the norm after clipping is worked out from the factor."""
    return after < before * (1 - 1e-6)


_FEW = 100  # points that a curve shows well by itself


def _draw_curve(axes: Axes, at: Any, values: Any, color: str, label: str) -> None:
    """The values, and where there are many a moving average over them."""
    if len(at) <= _FEW:
        axes.plot(at, values, color, label=label)
    else:
        width = len(at) // 50
        axes.plot(at, values, color, alpha=0.25, lw=0.8)
        axes.plot(at, _moving_average(values, width), color, label=f"{label}, mean of {width} steps")
    _scale(axes, values)


def _scale(axes: Axes, values: Any) -> None:
    """A logarithmic axis for values above 0 that reach over more than a power of ten."""
    known = values[np.isfinite(values)]
    if len(known) and known.min() > 0 and known.max() > 10 * known.min():
        axes.set_yscale("log")


def _moving_average(values: Any, width: int) -> Any:
    """The mean of the finite values in a window around each, narrower at the ends."""
    known, window = np.isfinite(values), np.ones(width)
    total = np.convolve(np.where(known, values, 0), window, "same")
    count = np.convolve(known.astype(float), window, "same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)
