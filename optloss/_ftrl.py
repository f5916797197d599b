"""Ftrl, the sixth of the original's optimizers, which Optax has not."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optloss._check import check_number
from optloss._numerics import sqrt
from optloss._rule import Choose, Leafwise, LearningRate, Numbers, optimizer_of, slots

__all__ = ["FtrlState", "ftrl"]


class FtrlState(NamedTuple):
    """State of `ftrl`."""

    accumulator: optax.Updates  # like the parameters: n, squared gradients added up
    linear: optax.Updates  # like the parameters: z


def ftrl(
    learning_rate: LearningRate,
    learning_rate_power: ArrayLike = -0.5,
    initial_accumulator_value: ArrayLike = 0.1,
    l1_regularization_strength: ArrayLike = 0.0,
    l2_regularization_strength: ArrayLike = 0.0,
    l2_shrinkage_regularization_strength: ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """Follow the regularised leader: weights worked out anew from all gradients so far.

    With p = learning_rate_power:

        n' = n + g ** 2
        z <- z + g + 2 * shrinkage * w - (n' ** -p - n ** -p) / learning_rate * w
        w <- 0 where |z| <= l1, else (l1 * sign(z) - z) / (n' ** -p / learning_rate + 2 * l2)

    The leader starts from the origin: the old weight enters through z alone, so that a first gradient of 0 sets the
    weight to 0 and small ones nearly so. It is an optimizer for linear models that start from 0.

    Args:
        learning_rate: A number > 0, a scalar array, or a function of the number of the step.
        learning_rate_power: p, <= 0; 0 is a rate that does not fall.
        initial_accumulator_value: Where n starts, >= 0.
        l1_regularization_strength: l1, >= 0; makes weights exactly 0.
        l2_regularization_strength: l2, >= 0.
        l2_shrinkage_regularization_strength: shrinkage, >= 0; a penalty on the size of the weights.

    Returns:
        A transformation with two slots, `accumulator` and `linear`. Its `update` needs the parameters.

    Raises:
        ValueError: A number out of its bounds; at `update`, no parameters.

    Example:
        >>> params = {"w": jnp.ones(2)}
        >>> tx = optloss.ftrl(0.1, l1_regularization_strength=0.01)
        >>> updates, state = tx.update({"w": jnp.array([1.0, -1.0])}, tx.init(params), params)

    As `tf.train.FtrlOptimizer`. Optax has none.

    Reference:
        McMahan et al., Ad Click Prediction: a View from the Trenches, 2013.
    """
    power = check_number("learning_rate_power", learning_rate_power, at_most=0)
    start = check_number("initial_accumulator_value", initial_accumulator_value, at_least=0)
    l1 = check_number("l1_regularization_strength", l1_regularization_strength, at_least=0)
    l2 = check_number("l2_regularization_strength", l2_regularization_strength, at_least=0)
    shrinkage = check_number("l2_shrinkage_regularization_strength", l2_shrinkage_regularization_strength, at_least=0)
    if isinstance(learning_rate, int | float) and learning_rate == 0:
        raise ValueError("learning_rate: got 0, by which Ftrl divides; a finite number > 0 would do.")

    def init_fn(params: optax.Params) -> FtrlState:
        return FtrlState(slots(params, start), slots(params, 0.0))

    def rule_fn(
        rate: jax.Array, leafwise: Leafwise, choose: Choose, state: FtrlState, params: optax.Params | None
    ) -> tuple[optax.Updates, FtrlState]:
        if params is None:
            raise ValueError("params: got None; Ftrl's update needs the parameters: update(updates, state, params).")

        numbers = (rate, power, l1, l2, shrinkage)
        slots = state.accumulator, state.linear
        updates, accumulator, linear = leafwise(_ftrl_rule, numbers, slots, given=(params,))
        return updates, FtrlState(accumulator, linear)

    # z grows with the weights, of which nothing is known.
    return optimizer_of(learning_rate, init_fn, rule_fn, is_safe=None)


def _ftrl_rule(
    choose: Choose, numbers: Numbers, g: jax.Array, n: jax.Array, z: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rate, power, l1, l2, shrinkage = numbers
    w = w.astype(n.dtype)
    new_n = n + g * g
    new_z = z + g + 2 * shrinkage * w - (_to_the_minus(power, new_n) - _to_the_minus(power, n)) / rate * w
    n, z = choose(new_n, n), choose(new_z, z)
    outside = jnp.abs(z) > l1
    divisor = jnp.where(outside, _to_the_minus(power, n) / rate + 2 * l2, 1)
    new_w = jnp.where(outside, (l1 * jnp.sign(z) - z) / divisor, 0)
    return new_w - w, n, z


def _to_the_minus(power: jax.Array, n: jax.Array) -> jax.Array:
    """Raises n to the power -power, by a square root for the usual one."""
    return jnp.where(power == -0.5, sqrt(n), n**-power)
