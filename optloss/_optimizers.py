"""Five of the original's six optimizers, to its numbers."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optloss._check import check_flag, check_number
from optloss._numerics import sqrt
from optloss._rule import (
    LARGEST_NORM,
    Choose,
    Leafwise,
    LearningRate,
    Numbers,
    optimizer_of,
    safe_below,
    safe_update,
    slots,
)

__all__ = [
    "AdagradState",
    "AdamState",
    "MomentumState",
    "RMSPropState",
    "adagrad",
    "adam",
    "momentum",
    "rmsprop",
    "sgd",
]


def sgd(learning_rate: LearningRate) -> optax.GradientTransformation:
    """Gradient descent.

        w <- w - learning_rate * g

    Args:
        learning_rate: A number >= 0, a scalar array, or a function of the number of the step.

    Returns:
        A transformation without slots.

    Raises:
        ValueError: `learning_rate` is negative, not finite or no scalar.

    Example:
        >>> updates, _ = optloss.sgd(0.1).update({"w": jnp.ones(2)}, optax.EmptyState())
        >>> updates["w"]
        Array([-0.1, -0.1], dtype=float32)

    As `tf.train.GradientDescentOptimizer`, and to the bit `optax.sgd`.
    """

    def rule_fn(
        rate: jax.Array, leafwise: Leafwise, choose: Choose, state: optax.EmptyState, params: optax.Params | None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del choose, params
        (updates,) = leafwise(_sgd_rule, (-rate,), ())
        return updates, state

    return optimizer_of(learning_rate, lambda params: optax.EmptyState(), rule_fn, safe_update)


def _sgd_rule(choose: Choose, numbers: Numbers, g: jax.Array) -> tuple[jax.Array]:
    (minus_rate,) = numbers
    return (choose(minus_rate * g, -jnp.zeros_like(g)),)


class MomentumState(NamedTuple):
    """State of `momentum`."""

    accumulator: optax.Updates  # like the parameters


def momentum(
    learning_rate: LearningRate, momentum: ArrayLike, use_nesterov: bool = False
) -> optax.GradientTransformation:
    """Gradient descent with momentum.

        a <- momentum * a + g
        w <- w - learning_rate * a,        or, Nesterov's, w - learning_rate * (g + momentum * a)

    Args:
        learning_rate: A number >= 0, a scalar array, or a function of the number of the step.
        momentum: Decay of the accumulator, >= 0.
        use_nesterov: Whether the step looks ahead.

    Returns:
        A transformation with one slot, `accumulator`.

    Raises:
        ValueError: A number out of its bounds.

    Example:
        >>> train = optloss.optimize_loss(
        ...     lambda w: w**2, 0, 0.1, lambda rate: optloss.momentum(rate, momentum=0.5, use_nesterov=True)
        ... )

    As `tf.train.MomentumOptimizer`, and to rounding `optax.sgd(learning_rate, momentum, nesterov)`. "Momentum" by name
    is a momentum of 0.9.

    Reference:
        Sutskever et al., On the importance of initialization and momentum in deep learning, 2013.
    """
    decay = check_number("momentum", momentum, at_least=0)
    check_flag("use_nesterov", use_nesterov)

    def init_fn(params: optax.Params) -> MomentumState:
        return MomentumState(slots(params, 0.0))

    def rule_fn(
        rate: jax.Array, leafwise: Leafwise, choose: Choose, state: MomentumState, params: optax.Params | None
    ) -> tuple[optax.Updates, MomentumState]:
        del choose, params
        rule = _nesterov_rule if use_nesterov else _momentum_rule
        updates, accumulator = leafwise(rule, (-rate, decay), (state.accumulator,))
        return updates, MomentumState(accumulator)

    largest = 2 * _sum_of_powers(decay) * LARGEST_NORM if isinstance(decay, float) and decay <= 1 else None
    return optimizer_of(learning_rate, init_fn, rule_fn, safe_below(largest))


def _momentum_rule(choose: Choose, numbers: Numbers, g: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    minus_rate, mu = numbers
    a = choose(mu * a + g, a)
    return choose(minus_rate * a, -jnp.zeros_like(a)), a


def _nesterov_rule(choose: Choose, numbers: Numbers, g: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    minus_rate, mu = numbers
    a = choose(mu * a + g, a)
    return choose(minus_rate * (g + mu * a), -jnp.zeros_like(a)), a


class AdagradState(NamedTuple):
    """State of `adagrad`."""

    accumulator: optax.Updates  # like the parameters


def adagrad(learning_rate: LearningRate, initial_accumulator_value: ArrayLike = 0.1) -> optax.GradientTransformation:
    """Gradient descent with rates that fall as squared gradients add up.

        a <- a + g ** 2
        w <- w - learning_rate * g / sqrt(a)

    Args:
        learning_rate: A number >= 0, a scalar array, or a function of the number of the step.
        initial_accumulator_value: Where a starts, > 0. There is no epsilon.

    Returns:
        A transformation with one slot, `accumulator`.

    Raises:
        ValueError: A number out of its bounds.

    Example:
        >>> updates, state = (tx := optloss.adagrad(0.1)).update({"w": jnp.ones(1)}, tx.init({"w": jnp.ones(1)}))
        >>> print(f"{updates['w'][0]:.5f} {state.accumulator['w'][0]:.1f}")
        -0.09535 1.1

    As `tf.train.AdagradOptimizer`. `optax.adagrad` adds an epsilon of 1e-7 under the root.

    Reference:
        Duchi et al., Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, 2011.
    """
    start = check_number("initial_accumulator_value", initial_accumulator_value, above=0)

    def init_fn(params: optax.Params) -> AdagradState:
        return AdagradState(slots(params, start))

    def rule_fn(
        rate: jax.Array, leafwise: Leafwise, choose: Choose, state: AdagradState, params: optax.Params | None
    ) -> tuple[optax.Updates, AdagradState]:
        del choose, params
        updates, accumulator = leafwise(_adagrad_rule, (-rate,), (state.accumulator,))
        return updates, AdagradState(accumulator)

    # |g| / sqrt(a + g**2), unless g**2 vanishes beside a or a square root of a tiny `a` is less than |g|.
    largest = 1 + LARGEST_NORM / math.sqrt(start) if isinstance(start, float) and start < 1e30 else None
    return optimizer_of(learning_rate, init_fn, rule_fn, safe_below(largest))


def _adagrad_rule(choose: Choose, numbers: Numbers, g: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    (minus_rate,) = numbers
    a = choose(a + g * g, a)
    return choose(minus_rate * g, -jnp.zeros_like(a)) / jnp.sqrt(a), a


class AdamState(NamedTuple):
    """State of `adam`."""

    m: optax.Updates  # like the parameters: average of the gradients
    v: optax.Updates  # like the parameters: average of their squares
    beta1_power: jax.Array  # shape=(), float32: beta1 to the power of the next step, counted from 1
    beta2_power: jax.Array  # shape=(), float32: beta2 to the same power


def adam(
    learning_rate: LearningRate, beta1: ArrayLike = 0.9, beta2: ArrayLike = 0.999, epsilon: ArrayLike = 1e-8
) -> optax.GradientTransformation:
    """Adam with TF1's place for epsilon.

        m <- m + (1 - beta1) * (g - m)
        v <- v + (1 - beta2) * (g ** 2 - v)
        w <- w - learning_rate * sqrt(1 - beta2 ** t) / (1 - beta1 ** t) * m / (sqrt(v) + epsilon)

    Args:
        learning_rate: A number >= 0, a scalar array, or a function of the number of the step.
        beta1: Decay of the average of gradients, from 0 to below 1.
        beta2: Decay of the average of their squares, from 0 to below 1.
        epsilon: Added to the root, >= 0; the paper's "epsilon hat", not corrected for the start.

    Returns:
        A transformation with two slots, `m` and `v`, and the powers of the betas, which are float32 in any case, as
        in TF1.

    Raises:
        ValueError: A number out of its bounds.

    Example:
        >>> updates, _ = (tx := optloss.adam(0.1)).update({"w": jnp.ones(1)}, tx.init({"w": jnp.ones(1)}))
        >>> print(f"{updates['w'][0]:.5f}")
        -0.10000

    As `tf.train.AdamOptimizer`, but slots of 16-bit parameters are float32: in float16 TF1's epsilon became 0, and in
    bfloat16 its beta2 became 1. `optax.adam` corrects epsilon too, which is a larger step where gradients are small:
    -9.9e-4 against TF1's -7.6e-4 at a rate of 1e-3 and a first gradient of 1e-6.

    Reference:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, 2014, the last lines of section 2.
    """
    b1 = check_number("beta1", beta1, at_least=0, at_most=1)
    b2 = check_number("beta2", beta2, at_least=0, at_most=1)
    eps = check_number("epsilon", epsilon, at_least=0)
    for argument, beta in (("beta1", b1), ("beta2", b2)):
        if isinstance(beta, float) and beta == 1:
            raise ValueError(f"{argument}: got 1; a finite number >= 0 and < 1 would do.")

    def init_fn(params: optax.Params) -> AdamState:
        powers = jnp.asarray(b1, jnp.float32), jnp.asarray(b2, jnp.float32)
        return AdamState(slots(params, 0.0), slots(params, 0.0), *powers)

    def rule_fn(
        rate: jax.Array, leafwise: Leafwise, choose: Choose, state: AdamState, params: optax.Params | None
    ) -> tuple[optax.Updates, AdamState]:
        del params
        beta1_32, beta2_32 = jnp.asarray(b1, jnp.float32), jnp.asarray(b2, jnp.float32)
        power1, power2 = state.beta1_power.astype(rate.dtype), state.beta2_power.astype(rate.dtype)
        alpha = rate * jnp.sqrt(1 - power2) / (1 - power1)
        # TF1: the betas that the powers are made of. 1 - float32(0.999) differs from 0.001 by 1e-5.
        numbers = (-alpha, 1 - beta1_32.astype(rate.dtype), 1 - beta2_32.astype(rate.dtype), eps)
        updates, m, v = leafwise(_adam_rule, numbers, (state.m, state.v))
        power1 = choose(state.beta1_power * beta1_32, state.beta1_power)
        power2 = choose(state.beta2_power * beta2_32, state.beta2_power)
        return updates, AdamState(m, v, power1, power2)

    largest = None
    if isinstance(b1, float) and isinstance(b2, float) and isinstance(eps, float) and b1**2 < b2 and eps > 1e-30:
        # By Cauchy and Schwarz |m| <= sqrt(v / spread), but for gradients below 1e-19, whose squares vanish.
        spread = (1 - b2) * (1 - b1**2 / b2) / (1 - b1) ** 2
        largest = (1 / math.sqrt(spread) + 1e-19 / eps) / (1 - b1)
    return optimizer_of(learning_rate, init_fn, rule_fn, safe_below(largest))


def _adam_rule(
    choose: Choose, numbers: Numbers, g: jax.Array, m: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    minus_alpha, keep1, keep2, eps = numbers
    m = choose(m + (g - m) * keep1, m)
    v = choose(v + (g * g - v) * keep2, v)
    # Chosen before the division, which is then the last: more than one use of a quotient would store it apart.
    return choose(minus_alpha * m, -jnp.zeros_like(m)) / (sqrt(v) + eps), m, v


class RMSPropState(NamedTuple):
    """State of `rmsprop`."""

    mean_square: optax.Updates  # like the parameters
    momentum: optax.Updates | None  # like the parameters; None where the momentum is 0
    mean_gradient: optax.Updates | None  # like the parameters; None where it is not centred


def rmsprop(
    learning_rate: LearningRate,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    centered: bool = False,
) -> optax.GradientTransformation:
    """Gradient descent on gradients divided by their moving root mean square.

        ms  <- ms + (1 - decay) * (g ** 2 - ms),        from 1
        mom <- momentum * mom + learning_rate * g / sqrt(ms + epsilon)
        w   <- w - mom

    centred: mg <- mg + (1 - decay) * (g - mg), and ms - mg ** 2 in place of ms under the root.

    Args:
        learning_rate: A number >= 0, a scalar array, or a function of the number of the step.
        decay: Decay of the averages, from 0 to 1.
        momentum: Decay of the momentum, >= 0.
        epsilon: Added under the root, > 0.
        centered: Whether the variance stands in place of the mean square.

    Returns:
        A transformation with up to three slots.

    Raises:
        ValueError: A number out of its bounds.

    Example:
        >>> updates, _ = (tx := optloss.rmsprop(0.1)).update({"w": jnp.ones(1)}, tx.init({"w": jnp.ones(1)}))
        >>> print(f"{updates['w'][0]:.5f}")
        -0.10000

    As `tf.train.RMSPropOptimizer`, and to rounding `optax.rmsprop(..., initial_scale=1, eps=1e-10)`; Optax's own
    defaults, an average from 0 and 1e-8, make the first step 3.2 times as long at a gradient of 1, 30 times at 0.1.

    Reference:
        Tieleman and Hinton, lecture 6.5 of Neural Networks for Machine Learning, 2012; Graves, Generating Sequences
        With Recurrent Neural Networks, 2013, for the centred form.
    """
    check_flag("centered", centered)
    decay = check_number("decay", decay, at_least=0, at_most=1)
    mu = check_number("momentum", momentum, at_least=0)
    eps = check_number("epsilon", epsilon, above=0)
    has_momentum = not (isinstance(mu, float) and mu == 0)

    def init_fn(params: optax.Params) -> RMSPropState:
        return RMSPropState(
            slots(params, 1.0),
            slots(params, 0.0) if has_momentum else None,
            slots(params, 0.0) if centered else None,
        )

    def rule_fn(
        rate: jax.Array, leafwise: Leafwise, choose: Choose, state: RMSPropState, params: optax.Params | None
    ) -> tuple[optax.Updates, RMSPropState]:
        del choose, params
        updates, *new = leafwise(_rmsprop_rule, (rate, decay, mu, eps), tuple(state))
        return updates, RMSPropState(*new)

    largest = None
    if isinstance(mu, float) and mu <= 1 and isinstance(eps, float) and isinstance(decay, float):
        largest = _sum_of_powers(mu) * LARGEST_NORM / math.sqrt(eps)
    return optimizer_of(learning_rate, init_fn, rule_fn, safe_below(largest))


def _rmsprop_rule(
    choose: Choose, numbers: Numbers, g: jax.Array, ms: jax.Array, momentum: jax.Array | None, mg: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    rate, decay, mu, eps = numbers
    keep = 1 - decay
    ms = choose(ms + (g * g - ms) * keep, ms)
    spread = ms
    if mg is not None:
        mg = choose(mg + (g - mg) * keep, mg)
        spread = jnp.maximum(ms - mg * mg, 0)  # rounding alone makes it negative
    step = choose(rate * g, jnp.zeros_like(g)) / jnp.sqrt(spread + eps)
    if momentum is None:
        return -step, ms, momentum, mg
    momentum = choose(mu * momentum + step, momentum)
    return choose(-momentum, -jnp.zeros_like(g)), ms, momentum, mg


def _sum_of_powers(decay: float) -> float:
    """The sum of a decay's powers over as many steps as can be counted."""
    return min(1 / (1 - decay), 2.0**31) if decay < 1 else 2.0**31
