"""How a rule for one leaf becomes an optimizer: its rate, its slots, the dtype in which it computes."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optloss._check import check_arity, check_number
from optloss._numerics import compute_dtype

__all__ = ["LearningRate", "leafwise", "optimizer_of", "slots"]

LearningRate: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]


class ScheduledState(NamedTuple):
    """State of an optimizer whose rate is a function of the step."""

    step: jax.Array  # shape=(), int32: the steps so far
    optimizer: optax.OptState


def optimizer_of(
    learning_rate: LearningRate,
    init_fn: Callable[[optax.Params], Any],
    update_fn: Callable[[jax.Array, optax.Updates, Any, optax.Params | None], tuple[optax.Updates, Any]],
) -> optax.GradientTransformation:
    """Makes the transformation of a rule that takes the rate of the step."""
    if callable(learning_rate):
        check_arity("learning_rate", learning_rate, ["count"])

        def scheduled_init(params: optax.Params) -> ScheduledState:
            return ScheduledState(jnp.zeros((), jnp.int32), init_fn(params))

        def scheduled_update(
            updates: optax.Updates, state: ScheduledState, params: optax.Params | None = None
        ) -> tuple[optax.Updates, ScheduledState]:
            rate = jnp.asarray(learning_rate(state.step))
            updates, inner = update_fn(rate, updates, state.optimizer, params)
            return updates, ScheduledState(optax.safe_increment(state.step), inner)

        return optax.GradientTransformation(scheduled_init, scheduled_update)
    rate = check_number("learning_rate", learning_rate, at_least=0, wrong_type=ValueError)

    def constant_update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        widest = compute_dtype(*(leaf.dtype for leaf in jax.tree.leaves(updates)))
        return update_fn(jnp.asarray(rate, widest), updates, state, params)

    return optax.GradientTransformation(init_fn, constant_update)


def slots(params: optax.Params, value: ArrayLike) -> optax.Updates:
    """A slot for each parameter, filled with `value`, in the dtype in which its step is computed."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value, dtype=compute_dtype(leaf.dtype)), params)


def leafwise(
    rule: Callable[..., tuple[jax.Array, ...]], updates: optax.Updates, *slots: Any, given: tuple[Any, ...] = ()
) -> tuple[Any, ...]:
    """Applies a rule from (gradient, slots..., given...) to (update, new slots...) to each leaf.

    It computes in the slots' dtype; the update leaves in the gradient's.
    """
    gradients, treedef = jax.tree.flatten(updates)
    columns = [jax.tree.leaves(tree) for tree in (*slots, *given)]
    rows = []
    for gradient, *others in zip(gradients, *columns, strict=True):
        dtype = others[0].dtype if others else compute_dtype(gradient.dtype)
        update, *rest = rule(gradient.astype(dtype), *others)
        rows.append((update.astype(gradient.dtype), *rest))
    if not rows:
        return updates, *slots
    return tuple(jax.tree.unflatten(treedef, column) for column in zip(*rows, strict=True))
