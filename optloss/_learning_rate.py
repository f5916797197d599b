"""The learning rate: its check, its decay, and the decayed rate as a stage."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optloss._check import check_arity, check_number, describe, is_real, shape_of_call, shown
from optloss._numerics import compute_dtype, scale_tree

__all__ = [
    "DecayFunction",
    "DecayedLearningRateState",
    "check_decay",
    "check_learning_rate",
    "decayed_rate",
    "from_schedule",
    "scale_by_decayed_learning_rate",
]

DecayFunction: TypeAlias = Callable[[jax.Array, jax.Array], ArrayLike]


def from_schedule(schedule: optax.Schedule) -> DecayFunction:
    """Makes a decay function of an Optax schedule.

        learning_rate * schedule(global_step)

    Args:
        schedule: A function from step to rate. With a `learning_rate` of 1.0 the rate is the schedule's own.

    Returns:
        A function for `learning_rate_decay_fn`.

    Raises:
        TypeError: `schedule` is no function of one argument.

    Example:
        >>> decay = optloss.from_schedule(optax.linear_schedule(0.1, 0.0, 100))
        >>> decay(1.0, 50)
        Array(0.05, dtype=float32, weak_type=True)

    TF1 had no schedules. In Optax the schedule is given in place of the rate.
    """
    if not callable(schedule):
        raise TypeError(f"schedule: got {shown(schedule)}; a function from step to rate would do.")
    check_arity("schedule", schedule, ["global_step"])
    return lambda learning_rate, global_step: learning_rate * schedule(global_step)


class DecayedLearningRateState(NamedTuple):
    """State of `scale_by_decayed_learning_rate`."""

    learning_rate: jax.Array  # shape=(), before its decay; may be changed between steps
    step: jax.Array  # shape=(), int32: the steps so far


def scale_by_decayed_learning_rate(
    learning_rate: ArrayLike, learning_rate_decay_fn: DecayFunction | None = None
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the negative of a decayed learning rate that is kept in the state.

        u' = -learning_rate_decay_fn(learning_rate, step) * u

    Args:
        learning_rate: The rate before its decay, >= 0: a number or a scalar array, traced too.
        learning_rate_decay_fn: `(learning_rate, global_step) -> learning_rate`, or None for a constant rate. The step
            is the pipeline's `global_step` where that is handed on, else the number of the update, from 0.

    Returns:
        A transformation whose state is a `DecayedLearningRateState`. Its rate is float32, or float64 where a parameter
        is, and another one can be put there without a recompilation.

    Raises:
        ValueError: `learning_rate` is negative, not finite or no scalar; the decay returns no scalar.
        TypeError: `learning_rate_decay_fn` is no function of two arguments.

    Example:
        >>> decay = lambda rate, step: optloss.exponential_decay(rate, step, 1, 0.5)
        >>> optimizer = optax.chain(optax.scale_by_adam(), optloss.scale_by_decayed_learning_rate(0.1, decay))
        >>> state = optimizer.init({"w": jnp.zeros(2)})
        >>> state = optax.tree.set(state, learning_rate=jnp.float32(0.2))

    In TF1 the rate was a variable of the graph. `optax.scale_by_learning_rate` fixes it while building, and
    `optax.scale_by_schedule` rounds it to the dtype of the gradients.
    """
    rate = check_learning_rate("learning_rate", learning_rate)
    check_decay("learning_rate_decay_fn", learning_rate_decay_fn)

    def init_fn(params: optax.Params) -> DecayedLearningRateState:
        dtype = compute_dtype(*(leaf.dtype for leaf in jax.tree.leaves(params)))
        return DecayedLearningRateState(jnp.asarray(rate, dtype), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: DecayedLearningRateState,
        params: optax.Params | None = None,
        *,
        global_step: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecayedLearningRateState]:
        del params, extra_args
        at_step = state.step if global_step is None else global_step
        scale = -decayed_rate(state.learning_rate, at_step, learning_rate_decay_fn)
        step = optax.safe_increment(state.step)
        return scale_tree(updates, scale), DecayedLearningRateState(state.learning_rate, step)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def decayed_rate(
    learning_rate: jax.Array, global_step: jax.Array | None, learning_rate_decay_fn: DecayFunction | None
) -> jax.Array:
    """The rate of this step, in the dtype in which the state keeps it."""
    if learning_rate_decay_fn is None:
        return learning_rate
    assert global_step is not None  # a decay without a counter is refused while building
    return jnp.asarray(learning_rate_decay_fn(learning_rate, global_step)).astype(learning_rate.dtype)


def check_learning_rate(argument: str, learning_rate: ArrayLike) -> ArrayLike:
    """Returns the rate, or raises the ValueError that TF1 raised for it, and for NaN and infinity."""
    rate = check_number(argument, learning_rate, at_least=0, wrong_type=ValueError)
    if isinstance(rate, float) and rate > float(np.finfo(np.float32).max):
        raise ValueError(f"{argument}: got {rate!r}, which is infinite in float32; a smaller number would do.")
    return rate


def check_decay(argument: str, decay_fn: DecayFunction | None) -> None:
    """Raises where `decay_fn` is no function from a rate and a step to a rate."""
    if decay_fn is None:
        return
    if not callable(decay_fn):
        raise TypeError(f"{argument}: got {shown(decay_fn)}; a function of (learning_rate, global_step) would do.")
    check_arity(argument, decay_fn, ["learning_rate", "global_step"])
    scalar = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    result = shape_of_call(argument, decay_fn, *scalar)
    dtype = getattr(result, "dtype", None)
    if dtype is None or result.shape != () or not is_real(dtype):
        raise ValueError(f"{argument}: {describe(decay_fn)} returns {result}; a scalar rate would do.")
