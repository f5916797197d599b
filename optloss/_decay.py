"""Five of TF1's nine learning rate decays, functions of (learning_rate, global_step), and what all nine share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optloss._check import check_flag, check_number, is_real, shown

__all__ = [
    "exponential_decay",
    "inverse_time_decay",
    "natural_exp_decay",
    "piecewise_constant",
    "polynomial_decay",
    "rate_and_progress",
]


def exponential_decay(
    learning_rate: ArrayLike,
    global_step: ArrayLike,
    decay_steps: ArrayLike,
    decay_rate: ArrayLike,
    staircase: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Multiplies the rate by `decay_rate` every `decay_steps` steps.

        learning_rate * decay_rate ** p,        p = global_step / decay_steps

    Args:
        learning_rate: The rate at step 0, a scalar. All is computed in its dtype, float32 for a Python number.
        global_step: The step, an integer scalar.
        decay_steps: Steps for one factor, > 0.
        decay_rate: The factor, >= 0.
        staircase: Rounds p down, so that the rate moves in jumps.
        name: TF1's name of the operation; it has no meaning here.

    Returns:
        The decayed rate, a scalar.

    Raises:
        ValueError: `global_step` is None or a number out of its bounds.

    Example:
        >>> optloss.exponential_decay(0.1, 2000, 1000, 0.5)
        Array(0.025, dtype=float32)

    TF1 gave NaN where `decay_steps` is 0. `optax.exponential_decay` is the same formula as a schedule, but constant for
    a `decay_rate` of 0.
    """
    del name
    check_number("decay_rate", decay_rate, at_least=0)
    rate, p = _rate_and_periods(learning_rate, global_step, decay_steps, staircase)
    return rate * jnp.asarray(decay_rate, rate.dtype) ** p


def natural_exp_decay(
    learning_rate: ArrayLike,
    global_step: ArrayLike,
    decay_steps: ArrayLike,
    decay_rate: ArrayLike,
    staircase: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Multiplies the rate by exp(-decay_rate) every `decay_steps` steps.

        learning_rate * exp(-decay_rate) ** p,        p = global_step / decay_steps

    Args:
        learning_rate: The rate at step 0, a scalar.
        global_step: The step, an integer scalar.
        decay_steps: Steps for one factor, > 0.
        decay_rate: The exponent.
        staircase: Rounds p down.
        name: TF1's name of the operation; it has no meaning here.

    Returns:
        The decayed rate, a scalar.

    Raises:
        ValueError: `global_step` is None or a number out of its bounds.

    Example:
        >>> print(f"{optloss.natural_exp_decay(0.1, 10, 10, 0.5):.6f}")
        0.060653

    As TF1's. Optax has none.
    """
    del name
    decay_rate = check_number("decay_rate", decay_rate)
    rate, p = _rate_and_periods(learning_rate, global_step, decay_steps, staircase)
    return rate * jnp.exp(-jnp.asarray(decay_rate, rate.dtype)) ** p


def inverse_time_decay(
    learning_rate: ArrayLike,
    global_step: ArrayLike,
    decay_steps: ArrayLike,
    decay_rate: ArrayLike,
    staircase: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Divides the rate by 1 + decay_rate * p.

        learning_rate / (1 + decay_rate * p),        p = global_step / decay_steps

    Args:
        learning_rate: The rate at step 0, a scalar.
        global_step: The step, an integer scalar.
        decay_steps: Steps for which p grows by 1, > 0.
        decay_rate: Growth of the divisor, >= 0.
        staircase: Rounds p down.
        name: TF1's name of the operation; it has no meaning here.

    Returns:
        The decayed rate, a scalar.

    Raises:
        ValueError: `global_step` is None or a number out of its bounds.

    Example:
        >>> optloss.inverse_time_decay(0.1, 20, 10, 0.5)
        Array(0.05, dtype=float32)

    As TF1's. Optax has none.
    """
    del name
    check_number("decay_rate", decay_rate, at_least=0)
    rate, p = _rate_and_periods(learning_rate, global_step, decay_steps, staircase)
    return rate / (1 + jnp.asarray(decay_rate, rate.dtype) * p)


def piecewise_constant(
    x: Any, boundaries: Sequence[Any], values: Sequence[ArrayLike], name: str | None = None
) -> jax.Array:
    """Returns the first of `values` up to and with the first boundary, the second up to the second, and so on.

    Args:
        x: The step, an integer scalar.
        boundaries: Steps, increasing integers; at a boundary the earlier value still holds.
        values: Rates, one more than boundaries.
        name: TF1's name of the operation; it has no meaning here.

    Returns:
        One of `values`, a scalar.

    Raises:
        ValueError: `x` is None, there are no boundaries, they do not increase, or the values are not one more.

    Example:
        >>> [float(optloss.piecewise_constant(step, [10], [1.0, 0.5])) for step in (10, 11)]
        [1.0, 0.5]

    As TF1's; comparisons are between integers, exact at any step. `optax.piecewise_constant_schedule` takes factors
    instead of values and switches one step earlier.
    """
    del name
    if x is None:
        raise ValueError("global_step: got None; piecewise_constant wants an integer scalar.")
    if not isinstance(boundaries, Sequence):
        raise TypeError(f"boundaries: got {shown(boundaries)}; a list of integers would do.")
    if not boundaries or len(values) != len(boundaries) + 1:
        raise ValueError(
            f"values: got {len(values)} for {len(boundaries)} boundaries; one boundary or more, and one value more "
            "than boundaries, would do."
        )
    for i, boundary in enumerate(boundaries):
        if isinstance(boundary, bool) or not jnp.issubdtype(jnp.result_type(boundary), jnp.integer):
            raise ValueError(f"boundaries: got {shown(boundary)}; integers would do, since steps are.")
        if i > 0 and not isinstance(boundary, jax.core.Tracer) and not boundary > boundaries[i - 1]:
            raise ValueError(f"boundaries: got {list(boundaries)}; they must increase.")
    rates = [_as_rate(f"values[{i}]", check_number(f"values[{i}]", value)) for i, value in enumerate(values)]
    rate = rates[-1]
    for boundary, value in zip(reversed(boundaries), reversed(rates[:-1]), strict=True):
        rate = jnp.where(x <= boundary, value, rate)
    return rate


def polynomial_decay(
    learning_rate: ArrayLike,
    global_step: ArrayLike,
    decay_steps: ArrayLike,
    end_learning_rate: ArrayLike = 0.0001,
    power: ArrayLike = 1.0,
    cycle: bool = False,
    name: str | None = None,
) -> jax.Array:
    """Moves the rate to `end_learning_rate` along a polynomial.

        (learning_rate - end) * (1 - s / N) ** power + end

    with s = min(global_step, decay_steps) and N = decay_steps, or, where it cycles, s = global_step and
    N = decay_steps * ceil(s / decay_steps): at a multiple of `decay_steps` the rate is `end`, one step later it
    jumps up.

    Args:
        learning_rate: The rate at step 0, a scalar.
        global_step: The step, an integer scalar.
        decay_steps: Steps to the end, > 0.
        end_learning_rate: The rate at the end.
        power: Exponent, >= 0; 1 is a straight line, 0 the constant rate.
        cycle: Whether it starts over, over ever more steps, instead of staying at the end.
        name: TF1's name of the operation; it has no meaning here.

    Returns:
        The decayed rate, a scalar.

    Raises:
        ValueError: `global_step` is None or a number out of its bounds.

    Example:
        >>> print(f"{optloss.polynomial_decay(0.1, 50, 100, end_learning_rate=0.0):.3f}")
        0.050

    As TF1's. `optax.polynomial_schedule` has no `cycle`.
    """
    del name
    check_number("power", power, at_least=0)
    check_number("end_learning_rate", end_learning_rate)
    rate, whole, fraction = rate_and_progress(learning_rate, global_step, "decay_steps", decay_steps)
    end = jnp.asarray(end_learning_rate, rate.dtype)
    left = 1 - jnp.minimum(whole + fraction, 1)
    if check_flag("cycle", cycle):
        at_end = (fraction == 0) & (whole > 0)
        left = jnp.where(at_end, 0, (1 - fraction) / jnp.maximum(whole + 1, 1))
    return (rate - end) * left ** jnp.asarray(power, rate.dtype) + end


def _rate_and_periods(
    learning_rate: ArrayLike, global_step: Any, decay_steps: ArrayLike, staircase: bool
) -> tuple[jax.Array, jax.Array]:
    """The rate, and how many times `decay_steps` have passed."""
    rate, whole, fraction = rate_and_progress(learning_rate, global_step, "decay_steps", decay_steps)
    return rate, whole if check_flag("staircase", staircase) else whole + fraction


def rate_and_progress(
    learning_rate: ArrayLike, global_step: Any, argument: str, decay_steps: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rate, how many whole periods of `decay_steps` have passed, and the fraction of the one that runs.

    All three have the rate's dtype. Between integers the division is exact, at any step and in any compiled form.
    """
    if global_step is None:
        raise ValueError("global_step: got None; a decay wants an integer scalar.")
    if isinstance(global_step, str) or not is_real(jnp.result_type(global_step)):
        raise TypeError(f"global_step: got {shown(global_step)}; an integer scalar would do.")
    steps = check_number(argument, decay_steps, above=0)
    rate = _as_rate("learning_rate", learning_rate)
    step = global_step if isinstance(global_step, int) else jnp.asarray(global_step)
    is_integer = isinstance(step, int) or jnp.issubdtype(step.dtype, jnp.integer)
    largest = np.inf if isinstance(step, int) else np.iinfo(step.dtype).max if is_integer else 0
    if is_integer and isinstance(steps, float) and steps.is_integer() and steps <= largest:
        whole, rest = divmod(step, int(steps))
        return rate, jnp.asarray(whole, rate.dtype), jnp.asarray(rest, rate.dtype) / jnp.asarray(steps, rate.dtype)
    periods = jnp.asarray(step, rate.dtype) / jnp.asarray(steps, rate.dtype)
    return rate, jnp.floor(periods), periods - jnp.floor(periods)


def _as_rate(argument: str, learning_rate: ArrayLike) -> jax.Array:
    if not isinstance(learning_rate, jax.Array | np.ndarray):  # whatever rates an array has, and its axes under vmap
        check_number(argument, learning_rate)
    rate = jnp.asarray(learning_rate)
    is_array = isinstance(learning_rate, jax.Array | np.ndarray | np.generic)
    return rate if is_array and jnp.issubdtype(rate.dtype, jnp.floating) else rate.astype(jnp.float32)
