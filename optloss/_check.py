"""Early errors: each names the argument, what came and what would do."""

import difflib
import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = [
    "check_arity",
    "check_choice",
    "check_flag",
    "check_number",
    "describe",
    "did_you_mean",
    "is_real",
    "named_call",
    "shape_of_call",
    "shown",
]


def check_number(
    argument: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    infinite: bool = False,
    wrong_type: type[Exception] = TypeError,
) -> float | jax.Array:
    """Returns `value` as a float, or as it is where it is traced and its value unknown.

    Integers, NumPy scalars and arrays of shape () are numbers; booleans, strings and complex are not.

    Args:
        argument: Name for the message.
        value: What came.
        at_least: Smallest value that will do.
        above: Value that must be exceeded.
        at_most: Largest value that will do.
        infinite: Whether infinity will do. NaN never does.
        wrong_type: The error where `value` is no number at all; ValueError where TF1 raised that.
    """
    expected = _expected(at_least, above, at_most, infinite=infinite)
    if isinstance(value, jax.core.Tracer):
        if value.shape == () and is_real(value.dtype):
            return value
        raise wrong_type(f"{argument}: got a traced {value.aval.str_short()}; {expected} would do.")
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array) and is_real(value.dtype)
    if isinstance(value, bool) or not (is_array or isinstance(value, int | float)):
        raise wrong_type(f"{argument}: got {shown(value)} of type {type(value).__name__}; {expected} would do.")
    if getattr(value, "shape", ()) != ():
        raise wrong_type(f"{argument}: got an array of shape {getattr(value, 'shape', ())}; {expected} would do.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    fits = (
        (infinite or math.isfinite(number))
        and not math.isnan(number)
        and (at_least is None or number >= at_least)
        and (above is None or number > above)
        and (at_most is None or number <= at_most)
    )
    if not fits:
        raise ValueError(f"{argument}: got {shown(value)}; {expected} would do.")
    return number


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def shown(value: object) -> str:
    """What came, for a message: its repr where that is short, and where it has one."""
    return _SHORT.repr(value)


def check_flag(argument: str, flag: object) -> bool:
    """Returns a flag; raises a TypeError where it is no boolean."""
    if not isinstance(flag, bool):
        raise TypeError(f"{argument}: got {shown(flag)} of type {type(flag).__name__}; True or False would do.")
    return flag


def _expected(at_least: float | None, above: float | None, at_most: float | None, *, infinite: bool) -> str:
    """The bounds in words."""
    bounds = [
        f"{sign} {bound:g}" for sign, bound in ((">=", at_least), (">", above), ("<=", at_most)) if bound is not None
    ]
    return " ".join(["a number" if infinite else "a finite number", " and ".join(bounds)]).strip()


def is_real(dtype: Any) -> bool:
    """Whether a dtype is of integers or of floating point numbers."""
    return bool(jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating))


def check_choice(argument: str, value: object, choices: Iterable[str]) -> str:
    """Returns `value` where it is one of `choices`, else raises a ValueError with the nearest of them."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        hint = did_you_mean(value, choices)
        raise ValueError(f"{argument}: got {shown(value)}.{hint} One of {', '.join(choices)} would do.")
    return value


_LONGEST_HINT = 60  # the matching takes the third power of the length
_MOST_HINTS = 200


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """A sentence with the nearest of `choices`, or nothing where none is near."""
    folded = {choice.casefold(): choice for choice in choices if len(choice) <= _LONGEST_HINT}
    near = difflib.get_close_matches(str(word)[:_LONGEST_HINT].casefold(), list(folded)[:_MOST_HINTS], n=1, cutoff=0.5)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def describe(function: Callable[..., Any]) -> str:
    """The name of a function with the file and line where it stands."""
    name = getattr(function, "__qualname__", None) or shown(function)
    code = getattr(function, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


def check_arity(argument: str, function: Callable[..., Any], parameters: Sequence[str]) -> None:
    """Raises a TypeError where `function` cannot be called with `parameters` by position."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in functions need not have one
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        takes = ", ".join(str(p.replace(annotation=p.empty)) for p in signature.parameters.values())
        wanted = ", ".join(parameters)
        raise TypeError(f"{argument}: {describe(function)} takes ({takes}), not ({wanted}): {error}.") from error


def shape_of_call(argument: str, function: Callable[..., Any], *args: ArrayLike | jax.ShapeDtypeStruct) -> Any:
    """The shapes and dtypes that `function` returns, found without running it.

    Whatever the function raises comes out as a TypeError or ValueError that names `argument`.
    """
    return named_call(argument, functools.partial(jax.eval_shape, function), *args, name=describe(function))


def named_call(argument: str, function: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Any:
    """Calls a user's function; whatever it raises comes out as a TypeError or ValueError that names `argument`."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        if str(error).startswith(f"{argument}:"):  # our own
            raise
        kind = ValueError if isinstance(error, ValueError) else TypeError
        first_line = str(error).split("\n", 1)[0][:300].replace("DynamicJaxprTracer", "traced array")
        raise kind(f"{argument}: {name or describe(function)} raised {type(error).__name__}: {first_line}") from error
