"""The rows of the table: what each is made of, how it is written, and what is to be reached."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from workers import Figures

__all__ = ["COLUMNS", "ROWS", "Results", "Row"]

COLUMNS = ("limit", "optloss", "Optax chain", "PyTorch")
NONE = "-"

Results: TypeAlias = Mapping[str, Figures]  # of a measurement, by column


class Row(NamedTuple):
    """A row of the table."""

    label: str
    to_reach: str
    measurements: tuple[str, ...]
    cells: Callable[..., list[str]]  # of the results of these
    large: bool = False


def ratios(results: Results) -> list[str]:
    """The limit's time, and the others' as multiples of it."""
    return [
        _cell(results, "limit", results["limit"].seconds, _duration),
        *(_cell(results, column, _multiple(results, column), _ratio) for column in COLUMNS[1:]),
    ]


def noise_over_plain(full: Results, plain: Results) -> list[str]:
    """What noise adds, as a part of the step without it."""
    return _shares(full, plain, lambda full, plain: (full - plain) / plain)


def noise_over_full(full: Results, plain: Results) -> list[str]:
    """What noise adds, as a part of the step with it."""
    return _shares(full, plain, lambda full, plain: (full - plain) / full)


def compilations(results: Results) -> list[str]:
    """Seconds of tracing and compilation."""
    return [_cell(results, column, _of(results, column).compile_seconds, _seconds) for column in COLUMNS]


def temporaries(results: Results) -> list[str]:
    """Bytes that a step needs beside its arguments and results."""
    return [_cell(results, column, _of(results, column).temporary_bytes, _megabytes) for column in COLUMNS]


def _shares(full: Results, plain: Results, share: Callable[[float, float], float]) -> list[str]:
    def value(column: str) -> float | None:
        of_full, of_plain = _multiple(full, column), _multiple(plain, column)
        return None if of_full is None or of_plain is None else share(of_full, of_plain)

    return [NONE, *(_cell(full, column, value(column), "{:.0%}".format) for column in COLUMNS[1:])]


def _multiple(results: Results, column: str) -> float | None:
    """Seconds as a multiple of the limit's in the same measurement."""
    seconds, limit = _of(results, column).seconds, results["limit"].seconds
    return None if seconds is None or limit is None else seconds / limit


def _cell(results: Results, column: str, value: float | None, text: Callable[[float], str]) -> str:
    if value is not None:
        return text(value)
    return _of(results, column).reason or NONE


def _of(results: Results, column: str) -> Figures:
    return results.get(column, Figures())


def _ratio(value: float) -> str:
    """Three digits that count."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _duration(seconds: float) -> str:
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "us") if seconds >= 1e-6 else (1e9, "ns")
    return f"{_ratio(seconds * scale)} {unit}"


def _seconds(seconds: float) -> str:
    return f"{_ratio(seconds)} s"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


ROWS = {
    "full-10m-10": Row("full step, 10M parameters in 10 arrays", "<= 1.8, then 1.3", ("full, 10M in 10",), ratios),
    "truncated-10m-10": Row(
        "the same, PyTorch's noise truncated as the others' is", NONE, ("truncated, 10M in 10",), ratios
    ),
    "full-100m-10": Row("full step, 100M in 10", "<= 1.8", ("full, 100M in 10",), ratios, large=True),
    "truncated-100m-10": Row(
        "the same, PyTorch's noise truncated", NONE, ("truncated, 100M in 10",), ratios, large=True
    ),
    "plain-100m-10": Row("without noise, 100M in 10", "<= 1.4", ("plain, 100M in 10",), ratios, large=True),
    "plain-10m-10": Row("without noise, 10M in 10", NONE, ("plain, 10M in 10",), ratios),
    "noise-over-plain": Row(
        "noise, over the step without it, 10M in 10",
        "<= 20%",
        ("full, 10M in 10", "quiet, 10M in 10"),
        noise_over_plain,
    ),
    "noise-over-full": Row(
        "noise, over the step with it, 10M in 10", NONE, ("full, 10M in 10", "quiet, 10M in 10"), noise_over_full
    ),
    "full-10m-300": Row("full step, 10M in 300", "<= 3", ("full, 10M in 300",), ratios),
    "truncated-10m-300": Row("the same, PyTorch's noise truncated", NONE, ("truncated, 10M in 300",), ratios),
    "full-100m-300": Row("full step, 100M in 300", "<= 2.5", ("full, 100M in 300",), ratios, large=True),
    "plain-10m-300": Row("without noise, 10M in 300", "<= 2", ("plain, 10M in 300",), ratios),
    "quiet-10m-300": Row("the same in a scan of 10 steps", "<= 2", ("quiet, 10M in 300",), ratios),
    "plain-3m-3000": Row("without noise, 3M in 3,000", "<= 15", ("plain, 3M in 3,000",), ratios),
    "compile-300": Row("compile, full step, 300 arrays", "<= 6 s", ("compile, 10M in 300",), compilations),
    "compile-3000": Row("compile, full step, 3,000 arrays", "<= 40 s", ("compile, 3M in 3,000",), compilations),
    "guard": Row('guard of 10M in 10, full step; limit: nonfinite="apply"', "<= 1.03", ("guard, with noise",), ratios),
    "guard-plain": Row("the same without noise", "<= 1.03", ("guard, without noise",), ratios),
    "transformation": Row(
        "full step as a transformation, updates returned, 10M in 10", NONE, ("transformation",), ratios
    ),
    "temporaries": Row("its temporaries", "<= 6 MB", ("transformation",), temporaries),
    "noise": Row("noise alone, a number; limit: jax.random", NONE, ("noise",), ratios),
    "histogram-read": Row("histogram of 10M values; limit: jnp.sum", NONE, ("histogram, read",), ratios),
    "histogram-jax": Row("the same; limit: jnp.histogram", NONE, ("histogram, jax",), ratios),
    "call": Row("a step of 4 arrays; limit: a bare jit of its state", NONE, ("call",), ratios),
    "call-list": Row("the same; limit: a bare jit of a list", NONE, ("call, list",), ratios),
    "scan": Row("the same in a scan of 100; limit: a bare jit of its state", NONE, ("scan",), ratios),
}
