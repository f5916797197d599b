"""The four cosine decays of TF1's nine, functions of (learning_rate, global_step)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optloss._check import check_number, shown
from optloss._decay import rate_and_progress

__all__ = ["cosine_decay", "cosine_decay_restarts", "linear_cosine_decay", "noisy_linear_cosine_decay"]


def cosine_decay(
    learning_rate: ArrayLike,
    global_step: ArrayLike,
    decay_steps: ArrayLike,
    alpha: ArrayLike = 0.0,
    name: str | None = None,
) -> jax.Array:
    """Moves the rate to `alpha` times itself along half a cosine.

        learning_rate * ((1 - alpha) * (1 + cos(pi * s / N)) / 2 + alpha),        s = min(global_step, N)

    Args:
        learning_rate: The rate at step 0, a scalar.
        global_step: The step, an integer scalar.
        decay_steps: N, steps to the end, > 0.
        alpha: What is left of the rate at the end.
        name: TF1's name of the operation; it has no meaning here.

    Returns:
        The decayed rate, a scalar.

    Raises:
        ValueError: `global_step` is None or a number out of its bounds.

    Example:
        >>> print(f"{optloss.cosine_decay(0.1, 50, 100):.3f}")
        0.050

    As TF1's, and as `optax.cosine_decay_schedule` with an exponent of 1.

    Reference:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2016.
    """
    del name
    check_number("alpha", alpha)
    rate, whole, fraction = rate_and_progress(learning_rate, global_step, "decay_steps", decay_steps)
    return _cosine(rate, jnp.minimum(whole + fraction, 1), jnp.ones_like(rate), alpha)


def cosine_decay_restarts(
    learning_rate: ArrayLike,
    global_step: ArrayLike,
    first_decay_steps: ArrayLike,
    t_mul: ArrayLike = 2.0,
    m_mul: ArrayLike = 1.0,
    alpha: ArrayLike = 0.0,
    name: str | None = None,
) -> jax.Array:
    """Starts a cosine decay over, each time `t_mul` times as long, from `m_mul` times the rate.

        learning_rate * ((1 - alpha) * m_mul ** i * (1 + cos(pi * f)) / 2 + alpha)

    in the i-th period, of which the fraction f is done. At a restart the rate is back at its top.

    Args:
        learning_rate: The rate at step 0, a scalar.
        global_step: The step, an integer scalar.
        first_decay_steps: Steps of the first period, > 0.
        t_mul: Length of a period by that of the one before, >= 1.
        m_mul: Top of a period by that of the one before.
        alpha: What is left of the rate at the end of a period.
        name: TF1's name of the operation; it has no meaning here.

    Returns:
        The decayed rate, a scalar.

    Raises:
        ValueError: `global_step` is None or a number out of its bounds.

    Example:
        >>> [f"{optloss.cosine_decay_restarts(0.1, step, 100):.3f}" for step in (50, 100, 200)]
        ['0.050', '0.100', '0.050']

    As TF1's, but a `t_mul` below 1, from some step on NaN there, is an error. Optax builds such schedules from a
    list of periods, `optax.sgdr_schedule`.

    Reference:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2016.
    """
    del name
    t_mul = check_number("t_mul", t_mul, at_least=1)
    m_mul = check_number("m_mul", m_mul, at_least=0)
    check_number("alpha", alpha)
    rate, period, fraction = rate_and_progress(learning_rate, global_step, "first_decay_steps", first_decay_steps)
    if not (isinstance(t_mul, float) and t_mul == 1):
        period, fraction = _growing_period(period, fraction, jnp.asarray(t_mul, rate.dtype))
    return _cosine(rate, fraction, jnp.asarray(m_mul, rate.dtype) ** period, alpha)


def _growing_period(whole: jax.Array, fraction: jax.Array, growth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which period it is, each `growth` times as long as the one before, and how much of it is over."""
    eps, periods = jnp.finfo(growth.dtype).eps, whole + fraction
    exponent = jnp.log(1 - periods * (1 - growth)) / jnp.log(growth)
    # At a restart rounded logarithms may fall short of the whole number; where they go beyond it, it is one less.
    period = jnp.floor(exponent + 4 * eps * (1 + exponent))
    is_integer = growth == jnp.floor(growth)
    start = (1 - growth**period) / (1 - growth)
    is_early = jnp.where(is_integer, whole < jnp.round(start), periods < start * (1 - 4 * eps))
    period = period - is_early
    start = (1 - growth**period) / (1 - growth)
    start = jnp.where(is_integer, jnp.round(start), start)
    return period, jnp.clip(((whole - start) + fraction) / growth**period, 0, 1)


def linear_cosine_decay(
    learning_rate: ArrayLike,
    global_step: ArrayLike,
    decay_steps: ArrayLike,
    num_periods: ArrayLike = 0.5,
    alpha: ArrayLike = 0.0,
    beta: ArrayLike = 0.001,
    name: str | None = None,
) -> jax.Array:
    """Lets a cosine swing under a line that falls to 0.

        learning_rate * ((alpha + (N - s) / N) * (1 + cos(2 * pi * num_periods * s / N)) / 2 + beta)

    with s = min(global_step, N). At step 0 it is learning_rate * (1 + alpha + beta), above the rate.

    Args:
        learning_rate: The rate, a scalar.
        global_step: The step, an integer scalar.
        decay_steps: N, steps to the end, > 0.
        num_periods: Swings of the cosine.
        alpha: Added to the line.
        beta: Added to the product.
        name: TF1's name of the operation; it has no meaning here.

    Returns:
        The decayed rate, a scalar.

    Raises:
        ValueError: `global_step` is None or a number out of its bounds.

    Example:
        >>> print(f"{optloss.linear_cosine_decay(0.1, 50, 100):.4f}")
        0.0251

    As TF1's. Optax has none.

    Reference:
        Bello et al., Neural Optimizer Search with Reinforcement Learning, 2017.
    """
    del name
    return _linear_cosine(learning_rate, global_step, decay_steps, num_periods, alpha, beta, noise=None)


def noisy_linear_cosine_decay(
    learning_rate: ArrayLike,
    global_step: ArrayLike,
    decay_steps: ArrayLike,
    initial_variance: ArrayLike = 1.0,
    variance_decay: ArrayLike = 0.55,
    num_periods: ArrayLike = 0.5,
    alpha: ArrayLike = 0.0,
    beta: ArrayLike = 0.001,
    name: str | None = None,
    *,
    key: int = 0,
) -> jax.Array:
    """`linear_cosine_decay` with normal noise, of falling variance, on the line.

        learning_rate * ((alpha + (N - s) / N + n) * (1 + cos(2 * pi * num_periods * s / N)) / 2 + beta)

    with n drawn from N(0, initial_variance / (1 + s) ** variance_decay). The rate can be negative.

    Args:
        learning_rate: The rate, a scalar.
        global_step: The step, an integer scalar.
        decay_steps: N, steps to the end, > 0.
        initial_variance: Variance of the noise at step 0, >= 0.
        variance_decay: Exponent of its fall.
        num_periods: Swings of the cosine.
        alpha: Added to the line.
        beta: Added to the product.
        name: TF1's name of the operation; it has no meaning here.
        key: Seed of the noise, as `jax.random.key` takes it, or a typed key.

    Returns:
        The decayed rate, a scalar: a pure function of the arguments, so one step has one rate.

    Raises:
        ValueError: `global_step` is None or a number out of its bounds.

    Example:
        >>> decay = lambda step: optloss.noisy_linear_cosine_decay(0.1, step, 100, key=1)
        >>> float(decay(3)) == float(decay(3)), float(decay(3)) == float(decay(4))
        (True, False)

    TF1 drew afresh whenever the rate was evaluated, twice in a step where it was also summarised. Optax has none.

    Reference:
        Bello et al., Neural Optimizer Search with Reinforcement Learning, 2017.
    """
    del name
    if not isinstance(key, int | np.integer | jax.Array):
        raise TypeError(f"key: got {shown(key)} of type {type(key).__name__}; an integer or a typed key would do.")
    variance = check_number("initial_variance", initial_variance, at_least=0)
    variance_decay = check_number("variance_decay", variance_decay, at_least=0)

    def noise(rate: jax.Array, step: jax.Array) -> jax.Array:
        base = jax.random.key(key) if isinstance(key, int | np.integer) else key
        word = global_step & 0xFFFFFFFF if isinstance(global_step, int) else global_step
        draw = jax.random.normal(jax.random.fold_in(base, word), (), jnp.float32).astype(rate.dtype)
        falling = (1 + step) ** jnp.asarray(variance_decay, rate.dtype)
        return draw * jnp.sqrt(jnp.asarray(variance, rate.dtype) / falling)

    return _linear_cosine(learning_rate, global_step, decay_steps, num_periods, alpha, beta, noise)


def _linear_cosine(
    learning_rate: ArrayLike,
    global_step: ArrayLike,
    decay_steps: ArrayLike,
    num_periods: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike,
    noise: Callable[[jax.Array, jax.Array], jax.Array] | None,
) -> jax.Array:
    for argument, value in (("num_periods", num_periods), ("alpha", alpha), ("beta", beta)):
        check_number(argument, value)
    rate, whole, fraction = rate_and_progress(learning_rate, global_step, "decay_steps", decay_steps)
    done = jnp.minimum(whole + fraction, 1)
    line = 1 - done
    if noise is not None:
        line = line + noise(rate, done * jnp.asarray(decay_steps, rate.dtype))
    swing = jnp.cos(math.pi * 2 * jnp.asarray(num_periods, rate.dtype) * done)
    line = jnp.asarray(alpha, rate.dtype) + line
    return rate * (line * (0.5 * (1 + swing)) + jnp.asarray(beta, rate.dtype))


def _cosine(rate: jax.Array, fraction: jax.Array, top: jax.Array, alpha: ArrayLike) -> jax.Array:
    alpha = jnp.asarray(alpha, rate.dtype)
    return rate * ((1 - alpha) * (0.5 * top * (1 + jnp.cos(math.pi * fraction))) + alpha)
