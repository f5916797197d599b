"""A fingerprint of a train op's settings and of the parameters it was made for, as an array in its state."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optloss._names import parameter_names

__all__ = ["FINGERPRINTED", "fact", "fingerprint"]

# One row each, in this order, which checkpoints know: rows may be added at the end, and never moved.
FINGERPRINTED = (
    *("learning_rate", "optimizer", "gradient_noise_scale", "gradient_multipliers", "clip_gradients"),
    *("learning_rate_decay_fn", "variables", "increment_global_step", "nonfinite", "noise_generator", "reproducible"),
    *("kind of optimizer", "params"),
)


def fingerprint(settings: Mapping[str, Any], optimizer: Any, params: Any) -> np.ndarray[Any, Any]:
    """Returns uint32 of shape (settings, 2): for each a hash and, where it is a number, the bits of its float32.

    Functions are told apart by their names, by the names and constants in them, and by what they close over, and not
    by their code, which is another under another Python.

    Args:
        settings: As they were given.
        optimizer: The transformation that came of the setting. Its kind is the names of its functions.
        params: The parameters.
    """
    leaves = zip(parameter_names(params), jax.tree.leaves(params), strict=True)
    facts = {name: fact(settings[name]) for name in FINGERPRINTED if name in settings}
    facts["optimizer"] = fact(optimizer)
    facts["kind of optimizer"] = fact(optimizer, with_numbers=False)
    facts["params"] = "; ".join(f"{name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves)
    rows = [[_hash(facts[name].encode()), _number(settings.get(name))] for name in FINGERPRINTED]
    return np.array(rows, np.uint32)


_DEEPEST = 20  # functions within functions: transformations close over others
_FEW = 4  # numbers of an array that are told
_NO_NUMBER = 0x7FC00001  # one of the many NaNs


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")


def _number(value: Any) -> int:
    """The bits of a number's float32."""
    return int(np.float32(float(value)).view(np.uint32)) if _is_number(value) else _NO_NUMBER


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    return is_real and not isinstance(value, jax.core.Tracer) and np.shape(value) == ()


def fact(value: Any, depth: int = _DEEPEST, *, with_numbers: bool = True) -> str:
    """What a setting is, in words that are the same in every process."""
    facts = functools.partial(_facts, depth=depth - 1, with_numbers=with_numbers)
    if depth == 0 or isinstance(value, jax.core.Tracer):
        return type(value).__name__
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{facts([key])}: {facts([value[key]])}' for key in sorted(value, key=str))}}}"
    if isinstance(value, optax.GradientTransformation):
        return fact(value.update, depth, with_numbers=with_numbers)
    if isinstance(value, list | tuple):
        return f"({facts(value)})"
    if isinstance(value, functools.partial):
        return f"partial({facts((value.func, value.args, value.keywords))})"
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if _is_number(value):
        return _in_words(value) if with_numbers else "number"
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        content = array.tolist() if array.size <= _FEW else _hash(array.tobytes())
        return f"{array.shape} {array.dtype} {content if with_numbers else ''}"
    if isinstance(value, bool | str | None):
        return repr(value)
    return f"{_name(value)}({facts(_inside(value, with_numbers))})" if callable(value) else type(value).__qualname__


def _in_words(number: Any) -> str:
    """An integer with all its digits, any other number as its float32; 1 and 1.0 are the same."""
    if isinstance(number, int) or np.issubdtype(np.asarray(number).dtype, np.integer):
        return str(int(number))
    return str(np.float32(float(number))).removesuffix(".0")


def _facts(values: Iterable[Any], depth: int, with_numbers: bool) -> str:
    return ", ".join(fact(value, depth, with_numbers=with_numbers) for value in values)


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _inside(function: Callable[..., Any], with_numbers: bool) -> tuple[Any, ...]:
    """What a function closes over and, of the user's own, the names and constants in it."""
    code = getattr(function, "__code__", None)
    if code is None:
        return ()
    cells = zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=True)
    closed = {variable: cell.cell_contents for variable, cell in cells if _is_bound(cell)}
    if function.__module__.split(".")[0] in ("jax", "optax", "optloss"):  # whose inside changes from version to version
        return (closed,)
    constants = [each for each in code.co_consts if isinstance(each, int | float | str)] if with_numbers else []
    return closed, code.co_names, constants, getattr(function, "__defaults__", None)


def _is_bound(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
