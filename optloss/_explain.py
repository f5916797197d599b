"""`train.explain(params)`: what a train op does and which parameter gets what, from shapes alone."""

import html
import textwrap
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optloss._axes import AxisNames
from optloss._check import shown
from optloss._clipping import ClipByFactor
from optloss._names import match_names, parameter_names, select_parameters
from optloss._optimizer_forms import OPTIMIZER_CLS_NAMES
from optloss._pipeline import Pipeline, init_stages
from optloss._trees import keep

__all__ = ["Explanation", "explain_pipeline"]


class _Parameter(NamedTuple):
    """What one parameter gets."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    key: str | None  # of `gradient_multipliers`, that matches its name
    multiplier: float | str | None  # a number, or what else it is in words
    noise: float | str | None
    slot_bytes: int  # of the optimizer's state that is this parameter's


class Explanation(NamedTuple):
    """What a train op does, as `train.explain(params)` and `transformation(...).explain(params)` find it.

    It takes shapes alone, and nothing runs on a device. It prints as a table, in a notebook too, and `to_dict()` gives
    it as plain values.

    Example:
        >>> train = optloss.optimize_loss(
        ...     lambda params: 0.0, 0, 0.1, "SGD", gradient_noise_scale=0.01, gradient_multipliers={"embed/*": 0.1}
        ... )
        >>> shapes = {"embed": {"table": jax.ShapeDtypeStruct((1000, 16), "float32")}, "steps": 0}
        >>> train.explain(shapes)
        OptimizeLoss: grad -> noise 0.01 -> multipliers (1) -> SGD, rate 0.1 -> skip unless finite -> apply -> step + 1
        summaries: loss, learning_rate, global_gradient_norm
        <BLANKLINE>
        parameter    shape       dtype    trained  key      multiplier  noise  slots
        embed/table  (1000, 16)  float32  yes      embed/*         0.1   0.01    0 B
        steps        ()          int32    no                                     0 B
        <BLANKLINE>
        2 parameters, 16,001 numbers, 64.0 kB; trained: 1, 16,000 numbers, 64.0 kB; slots 0 B, other state 124 B

    TF1 had no such thing. Optax has none.
    """

    name: str
    pipeline: str  # the stages in one line
    summaries: tuple[str, ...]
    parameters: tuple[_Parameter, ...]
    totals: dict[str, int]  # numbers, bytes and so on, of all parameters and of those that are trained
    warnings: tuple[str, ...]  # settings that cannot do what they say

    def to_dict(self) -> dict[str, Any]:
        """The explanation as dicts, lists, strings and numbers."""
        return self._asdict() | {
            "summaries": list(self.summaries),
            "parameters": [row._asdict() | {"shape": list(row.shape)} for row in self.parameters],
            "totals": dict(self.totals),
            "warnings": list(self.warnings),
        }

    def __repr__(self) -> str:
        """The explanation as text; in the middle of very many parameters some lines are left out."""
        cells = [_COLUMNS, *map(_cells, self.parameters)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
        if len(lines) > _MOST_LINES:
            half = _MOST_LINES // 2
            lines[half:-half] = [f"... {len(lines) - 2 * half} more, all of them in to_dict() ..."]
        warned = [_wrapped(f"warning: {warning}") for warning in self.warnings]
        return "\n".join([*map(_wrapped, self._head()), "", *lines, "", _wrapped(self._foot()), *warned])

    def _repr_html_(self) -> str:
        """The explanation as a notebook shows it."""
        head, *rows = [_COLUMNS, *map(_cells, self.parameters)]
        table = [_html_row("th", head), *(_html_row("td", row) for row in rows)]
        warned = [f"<p><b>warning:</b> {html.escape(warning)}</p>" for warning in self.warnings]
        above = "<br>".join(map(html.escape, self._head()))
        below = f"<p>{html.escape(self._foot())}</p>"
        return "\n".join([f"<p>{above}</p>", "<table>", *table, "</table>", below, *warned])

    def _head(self) -> list[str]:
        return [f"{self.name}: {self.pipeline}", f"summaries: {', '.join(self.summaries) or 'none'}"]

    def _foot(self) -> str:
        t = self.totals
        return (
            f"{t['parameters']:,} parameters, {t['numbers']:,} numbers, {_bytes(t['bytes'])}; trained: "
            f"{t['trained_parameters']:,}, {t['trained_numbers']:,} numbers, {_bytes(t['trained_bytes'])}; "
            f"slots {_bytes(t['slot_bytes'])}, other state {_bytes(t['other_state_bytes'])}"
        )


def _wrapped(line: str) -> str:
    return textwrap.fill(line, width=120, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


_COLUMNS = ("parameter", "shape", "dtype", "trained", "key", "multiplier", "noise", "slots")
_RIGHT = {"multiplier", "noise", "slots"}
_MOST_LINES = 200
_LONGEST_NAME = 100


def _cells(row: _Parameter) -> tuple[str, ...]:
    numbers = ["" if value is None else _number(value) for value in (row.multiplier, row.noise)]
    return (
        *(_printable(row.name), str(row.shape), row.dtype, "yes" if row.trained else "no", _printable(row.key or "")),
        *(*numbers, _bytes(row.slot_bytes)),
    )


def _printable(name: str) -> str:
    """A name that breaks no line, and of a very long one its ends."""
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 2]}...{name[-_LONGEST_NAME // 2 :]}"


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        cell.rjust(width) if column in _RIGHT else cell.ljust(width)
        for column, cell, width in zip(_COLUMNS, row, widths, strict=True)
    ]


def _html_row(kind: str, row: tuple[str, ...]) -> str:
    cells = [
        f'<{kind} style="text-align: {"right" if column in _RIGHT else "left"}">{html.escape(cell)}</{kind}>'
        for column, cell in zip(_COLUMNS, row, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _bytes(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def explain_pipeline(pipeline: Pipeline, axes: AxisNames, params: Any) -> Explanation:
    """Explains a train op for parameters or their shapes. Nothing runs on a device.

    Raises:
        ValueError: What `init` would raise.
    """
    for leaf in jax.tree.leaves(params):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float):
            raise TypeError(
                f"params: got {shown(leaf)} of type {type(leaf).__name__} among the leaves; shapes would do."
            )
    params, state = jax.eval_shape(lambda params: (params, init_stages(pipeline, params, _any_key(pipeline))), params)
    selected = select_parameters(pipeline.variables, params)
    names, leaves = parameter_names(params), jax.tree.leaves(params)
    multipliers = pipeline.settings["gradient_multipliers"] or {}
    keys = match_names("gradient_multipliers", multipliers, names)
    slots = _slot_bytes(state.optimizer, keep(params, selected))
    noise = pipeline.settings["gradient_noise_scale"]
    rows = tuple(
        _Parameter(
            name=name,
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            trained=trained,
            key=keys.get(name),
            multiplier=_value(multipliers[keys[name]]) if name in keys else None,
            noise=_value(noise) if trained and noise is not None else None,
            slot_bytes=slots.get(name, 0),
        )
        for name, leaf, trained in zip(names, leaves, selected, strict=True)
    )
    return Explanation(
        name=pipeline.name,
        pipeline=" -> ".join(_stages(pipeline, axes)),
        summaries=pipeline.summaries,
        parameters=rows,
        totals=_totals(leaves, selected, state, sum(slots.values())),
        warnings=tuple(_warnings(pipeline, rows)),
    )


def _any_key(pipeline: Pipeline) -> Any:
    return 0 if pipeline.key is None else pipeline.key


def _nbytes(leaf: Any) -> int:
    return int(leaf.size * leaf.dtype.itemsize)


def _slot_bytes(optimizer_state: Any, trained: Any) -> dict[str, int]:
    """The bytes of the leaves of the optimizer's state whose path ends in a parameter's, by its name."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(trained)[0]]
    named = dict(zip(paths, parameter_names(trained), strict=True))
    lengths = sorted({len(path) for path in paths}, reverse=True)
    found: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(optimizer_state)[0]:
        ends = (path[len(path) - length :] for length in lengths if length <= len(path))
        name = next((named[end] for end in ends if end in named and (end or leaf.shape)), None)
        if name is not None:
            found[name] = found.get(name, 0) + _nbytes(leaf)
    return found


def _totals(leaves: list[Any], selected: list[bool], state: Any, slots: int) -> dict[str, int]:
    trained = [leaf for leaf, chosen in zip(leaves, selected, strict=True) if chosen]
    return {
        "parameters": len(leaves),
        "numbers": sum(leaf.size for leaf in leaves),
        "bytes": sum(map(_nbytes, leaves)),
        "trained_parameters": len(trained),
        "trained_numbers": sum(leaf.size for leaf in trained),
        "trained_bytes": sum(map(_nbytes, trained)),
        "slot_bytes": slots,
        "other_state_bytes": sum(map(_nbytes, jax.tree.leaves(state))) - slots,
    }


def _stages(pipeline: Pipeline, axes: AxisNames) -> list[str]:
    """The stages of a step in their order, a few words for each."""
    asked = pipeline.settings
    stages = ["grad"]
    if axes:
        stages.append(f"mean over {', '.join(map(repr, axes))}")
    if pipeline.noise is not None:
        stages.append(f"noise {_shown(asked['gradient_noise_scale'])}")
    if asked["gradient_multipliers"]:
        stages.append(f"multipliers ({len(asked['gradient_multipliers'])})")
    if pipeline.clip is not None:
        clip = pipeline.clip
        named = clip.description if isinstance(clip, ClipByFactor) else f"clip by {_name(asked['clip_gradients'])}"
        stages.append(named)
    stages.append(_optimizer_name(asked["optimizer"]))
    if pipeline.learning_rate is not None and not isinstance(asked["optimizer"], optax.GradientTransformation):
        stages[-1] += f", rate {_shown(pipeline.learning_rate)}"
        if pipeline.learning_rate_decay_fn is not None:
            stages[-1] += f" by {_name(pipeline.learning_rate_decay_fn)}"
    if pipeline.skips_nonfinite:
        stages.append("skip unless finite")
    stages.append("apply")
    if pipeline.global_step is not None:
        stages.append("step + 1" if pipeline.increment_global_step else "step as it is")
    return stages


def _value(value: Any) -> float | str:
    """A number as it is; anything else in words."""
    if callable(value):
        return f"by {_name(value)}"
    if isinstance(value, jax.core.Tracer):
        return "traced"
    if np.shape(value):
        return f"array {np.shape(value)}"
    return float(value)


def _shown(value: Any) -> str:
    return _number(_value(value))


def _name(function: Any) -> str:
    """The name of a function, or, where it has none, of the decay in it or of the builder that made it."""
    if isinstance(function, optax.GradientTransformation):
        function = function.update
    function = getattr(function, "func", function)  # of a partial
    name = getattr(function, "__qualname__", type(function).__name__)
    if str(getattr(function, "__module__", "")).split(".")[0] in ("optax", "optloss"):
        return str(name.split(".")[0])
    if name.endswith("<lambda>"):
        inside = [
            called for called in function.__code__.co_names if "_decay" in called or called == "piecewise_constant"
        ]
        return inside[0] if inside else "a function"
    return str(name.split(".")[-1])


def _optimizer_name(optimizer: Any) -> str:
    named = [name for name, function in OPTIMIZER_CLS_NAMES.items() if function is optimizer]
    return optimizer if isinstance(optimizer, str) else named[0] if named else _name(optimizer)


_SCALE_FREE = frozenset(
    [
        *("Adagrad", "Adam", "RMSProp", "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw"),
        *("adamw", "adan", "amsgrad", "fromage", "lamb", "lars", "lion", "nadam", "nadamw", "novograd", "rmsprop"),
        *("rprop", "sign_sgd", "sm3", "yogi"),
    ]
)
"""Optimizers that divide a constant factor of the gradients out again; a test measures which do."""


def _warnings(pipeline: Pipeline, rows: tuple[_Parameter, ...]) -> list[str]:
    """What is set and cannot do what it says."""
    asked, found = pipeline.settings, []
    rate, optimizer = pipeline.learning_rate, _optimizer_name(asked["optimizer"])
    is_constant = {row.name: isinstance(row.multiplier, float) and row.multiplier not in (0, 1) for row in rows}
    if optimizer in _SCALE_FREE and any(is_constant[row.name] for row in rows if row.trained):
        found.append(
            f"gradient_multipliers: {optimizer} divides a constant factor out again, so that it changes no step's "
            "size, only the norm's shares; SGD or Momentum would heed it."
        )
    for key in asked["gradient_multipliers"] or {}:
        if not any(row.trained for row in rows if row.key == key):
            found.append(f"gradient_multipliers: {key!r} matches nothing that is trained.")
    if isinstance(pipeline.clip, ClipByFactor) and pipeline.clip.warning:
        found.append(f"clip_gradients: {pipeline.clip.warning}")
    if pipeline.noise is None and pipeline.key is not None:
        found.append("key: there is no noise that it could be for.")
    if rate is not None and isinstance(asked["optimizer"], optax.GradientTransformation):
        found.append(
            f"learning_rate: {_shown(rate)} does not reach the optimizer, a GradientTransformation with its own; a "
            "function of the rate would take it."
        )
    if rate is not None and _value(rate) == 0:
        found.append("learning_rate: 0.0 trains nothing.")
    if rate is None and asked["learning_rate_decay_fn"] is not None:
        found.append("learning_rate_decay_fn: it is not called, since learning_rate is None.")
    if asked["summaries"] is not None and "learning_rate" in pipeline.summaries and not pipeline.learning_rate_decay_fn:
        found.append("summaries: 'learning_rate' is reported with a learning_rate_decay_fn alone.")
    return found
