"""Gradient multipliers: a factor for each named parameter."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optloss._check import check_arity, check_number, is_real, shape_of_call, shown
from optloss._names import match_names, parameter_names
from optloss._numerics import compute_dtype

__all__ = ["Multiplier", "MultiplyByFactors", "MultiplyGradientsState", "check_multipliers", "multiply_gradients"]

Multiplier: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]


class MultiplyGradientsState(NamedTuple):
    """State of `multiply_gradients`."""

    step: jax.Array | None  # shape=(), int32: the steps so far; None where no factor is a function of the step


class MultiplyByFactors(optax.GradientTransformationExtraArgs):
    """A transformation that multiplies each update by its factor."""

    factors: Callable[[optax.Updates, Any, jax.Array | None], list[jax.Array | None]]
    """The factor of each leaf at a step: a scalar, an array, or None where it has none."""


def multiply_gradients(gradient_multipliers: Mapping[str, Multiplier]) -> MultiplyByFactors:
    """Multiplies the gradients of named parameters.

        g'_name = factor_name * g_name

    Args:
        gradient_multipliers: Factors by name or pattern. A name is the "/"-joined path of a parameter; `*` matches
            within one part of it, `**` any number of parts; a full name goes before a pattern. A factor is a number,
            an array that broadcasts to the parameter's shape, or a function of the step, which is the pipeline's
            `global_step` inside `optimize_loss` and the number of the update elsewhere.

    Returns:
        A transformation whose state is a `MultiplyGradientsState`.

    Raises:
        ValueError: A factor is None, not finite or has a wrong shape; at `init`, a key matches no parameter or two
            patterns match one.
        TypeError: `gradient_multipliers` is no mapping, a key no string, or a factor no number.

    Example:
        >>> multiply = optloss.multiply_gradients({"embed/*": 0.1})
        >>> gradients = {"embed": {"table": jnp.ones(2)}, "out": jnp.ones(2)}
        >>> multiplied, _ = multiply.update(gradients, multiply.init(gradients))
        >>> multiplied["embed"]["table"], multiplied["out"]
        (Array([0.1, 0.1], dtype=float32), Array([1., 1.], dtype=float32))

    TF1 took variables or their full names with ":0" and ignored in silence a name that no variable has. Optax has no
    such transformation; `optax.masked(optax.scale(0.1), mask)` wants a mask. Adam, RMSProp and Adagrad divide a
    constant factor out again: under them a multiplier changes the gradient's share of the norm, not the step's size.
    """
    check_multipliers("gradient_multipliers", gradient_multipliers)
    counts = any(callable(factor) for factor in gradient_multipliers.values())

    def init_fn(params: optax.Params) -> MultiplyGradientsState:
        names = parameter_names(params)
        keys = match_names("gradient_multipliers", gradient_multipliers, names)
        for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
            if name in keys:
                _check_shape(name, leaf, gradient_multipliers[keys[name]])
        return MultiplyGradientsState(jnp.zeros((), jnp.int32) if counts else None)

    def factors(
        updates: optax.Updates, state: MultiplyGradientsState, global_step: jax.Array | None
    ) -> list[jax.Array | None]:
        at_step = state.step if global_step is None else global_step
        names = parameter_names(updates)
        # The keys were checked at `init`, where the parameters that are not trained were there too.
        keys = match_names("gradient_multipliers", gradient_multipliers, names, all_match=False)
        return [
            _factor(leaf, gradient_multipliers[keys[name]], at_step) if name in keys else None
            for leaf, name in zip(jax.tree.leaves(updates), names, strict=True)
        ]

    def update_fn(
        updates: optax.Updates,
        state: MultiplyGradientsState,
        params: optax.Params | None = None,
        *,
        global_step: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MultiplyGradientsState]:
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        multiplied = [
            leaf if factor is None else (leaf.astype(factor.dtype) * factor).astype(leaf.dtype)
            for leaf, factor in zip(leaves, factors(updates, state, global_step), strict=True)
        ]
        step = None if state.step is None else optax.safe_increment(state.step)
        return jax.tree.unflatten(treedef, multiplied), MultiplyGradientsState(step)

    multiply = MultiplyByFactors(init_fn, update_fn)
    multiply.factors = factors
    return multiply


def check_multipliers(argument: str, multipliers: Mapping[str, Multiplier]) -> None:
    """Raises what can be said of the multipliers before the parameters are known."""
    if not isinstance(multipliers, Mapping):
        raise TypeError(
            f"{argument}: got {shown(multipliers)} of type {type(multipliers).__name__}; "
            "a dict from names to factors would do."
        )
    for name, factor in multipliers.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument}: got the key {shown(name)}; the name of a parameter, or a pattern, would do.")
        entry = f"{argument}[{shown(name)}]"
        if factor is None:
            raise ValueError(f"{entry}: None values not supported; a number, an array or a function of the step.")
        if callable(factor):
            check_arity(entry, factor, ["global_step"])
            shape = shape_of_call(entry, factor, jax.ShapeDtypeStruct((), jnp.int32))
            if not is_real(getattr(shape, "dtype", np.dtype(object))):
                raise ValueError(f"{entry}: the function returns {shape}; a number would do.")
        elif getattr(factor, "shape", None) in (None, ()):
            check_number(entry, factor)
        elif not isinstance(factor, np.ndarray | jax.Array) or not is_real(factor.dtype):
            raise TypeError(f"{entry}: got {shown(factor)}; real numbers would do.")
        elif not isinstance(factor, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(factor, np.float64))):
            raise ValueError(f"{entry}: got {shown(factor)}; finite numbers would do.")


def _check_shape(name: str, leaf: jax.Array, factor: Multiplier) -> None:
    factor = shape_of_call(name, factor, jax.ShapeDtypeStruct((), jnp.int32)) if callable(factor) else factor
    shape = np.shape(factor)
    try:
        fits = np.broadcast_shapes(shape, leaf.shape) == leaf.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"gradient_multipliers[{name!r}]: got shape {shape}, which does not broadcast to the "
            f"parameter's {leaf.shape}."
        )


def _factor(leaf: jax.Array, factor: Multiplier, step: Any) -> jax.Array | None:
    """The factor in the dtype in which the leaf is computed; integers have none."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    value = jnp.asarray(factor(step) if callable(factor) else factor, compute_dtype(leaf.dtype))
    return value if value.ndim == 0 else jnp.broadcast_to(value, leaf.shape)
