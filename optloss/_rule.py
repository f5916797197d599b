"""How a rule for one leaf becomes an optimizer: its rate, its slots, the dtype in which it computes, its guard."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optloss._check import check_arity, check_number
from optloss._numerics import compute_dtype

__all__ = [
    "LARGEST_NORM",
    "Choose",
    "GuardedOptimizer",
    "Leafwise",
    "LearningRate",
    "Numbers",
    "optimizer_of",
    "safe_below",
    "safe_update",
    "slots",
]

LearningRate: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]
Choose: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]  # of new and old
Numbers: TypeAlias = list[jax.Array]  # what a rule is made of, in the dtype in which it computes
Leafwise: TypeAlias = Callable[..., tuple[Any, ...]]  # of a rule, its numbers, its slots, and trees that are only read
UpdateRule: TypeAlias = Callable[
    [jax.Array, Leafwise, Choose, Any, optax.Params | None],  # rate, leafwise, choose, state, params
    tuple[optax.Updates, Any],
]

# Norms that optimizers with slots take: their squares, added up or averaged over any number of steps, stay finite.
LARGEST_NORM = 1e15
# Below half an ulp of the largest float32: such an update cannot push a finite parameter to infinity.
_LARGEST_UPDATE = 1e30


class ScheduledState(NamedTuple):
    """State of an optimizer whose rate is a function of the step."""

    step: jax.Array  # shape=(), int32: the steps so far
    optimizer: optax.OptState


class GuardedOptimizer(optax.GradientTransformationExtraArgs):
    """An optimizer that is told, before it writes anything, whether to leave everything as it was.

    So a guarded step writes over its own state, where one that is looked at afterwards needs a second state.
    """

    is_safe: Callable[[jax.Array, optax.Updates], jax.Array]
    """Whether updates of this norm can make no NaN or infinity of what is finite."""

    guarded_update: Callable[[jax.Array, optax.Updates, Any, optax.Params], tuple[optax.Updates, Any]]
    """The update where the first argument is true, else updates of -0.0 and the state to the bit."""


def optimizer_of(
    learning_rate: LearningRate,
    init_fn: Callable[[optax.Params], Any],
    rule_fn: UpdateRule,
    is_safe: Callable[[jax.Array, jax.Array], jax.Array] | None,
) -> optax.GradientTransformation:
    """Makes the transformation of a rule that takes the rate of the step.

    `is_safe(rate, norm)` tells that a step cannot overflow, if it held for all steps before; None where nothing can.
    """
    if callable(learning_rate):
        return _scheduled(learning_rate, init_fn, rule_fn)
    checked = check_number("learning_rate", learning_rate, at_least=0, wrong_type=ValueError)

    def rate_of(updates: optax.Updates) -> jax.Array:
        return jnp.asarray(checked, compute_dtype(*(leaf.dtype for leaf in jax.tree.leaves(updates))))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        return rule_fn(rate_of(updates), functools.partial(_leafwise, updates, None), _new, state, params)

    def guarded_update(
        finite: jax.Array, updates: optax.Updates, state: Any, params: optax.Params
    ) -> tuple[optax.Updates, Any]:
        leafwise = functools.partial(_leafwise, updates, finite)
        return rule_fn(rate_of(updates), leafwise, functools.partial(_where, finite), state, params)

    if is_safe is None:
        return optax.GradientTransformationExtraArgs(init_fn, update_fn)
    optimizer = GuardedOptimizer(init_fn, update_fn)
    optimizer.is_safe = lambda norm, updates: is_safe(rate_of(updates), norm)
    optimizer.guarded_update = guarded_update
    return optimizer


def safe_below(largest_per_rate: float | None) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """The test of an optimizer with slots, whose updates are at most `rate * largest_per_rate`; None if unknown."""
    if largest_per_rate is None:
        return None
    return lambda rate, norm: (norm <= LARGEST_NORM) & (jnp.abs(rate) * largest_per_rate <= _LARGEST_UPDATE)


def safe_update(rate: jax.Array, norm: jax.Array) -> jax.Array:
    """The test of an optimizer without slots, whose updates are `rate` times the gradient."""
    return jnp.abs(rate) * norm <= _LARGEST_UPDATE


def _scheduled(
    learning_rate: Callable[[jax.Array], ArrayLike],
    init_fn: Callable[[optax.Params], Any],
    rule_fn: UpdateRule,
) -> optax.GradientTransformation:
    check_arity("learning_rate", learning_rate, ["count"])

    def scheduled_init(params: optax.Params) -> ScheduledState:
        return ScheduledState(jnp.zeros((), jnp.int32), init_fn(params))

    def scheduled_update(
        updates: optax.Updates, state: ScheduledState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScheduledState]:
        rate = jnp.asarray(learning_rate(state.step))
        leafwise = functools.partial(_leafwise, updates, None)
        updates, inner = rule_fn(rate, leafwise, _new, state.optimizer, params)
        return updates, ScheduledState(optax.safe_increment(state.step), inner)

    return optax.GradientTransformation(scheduled_init, scheduled_update)


def slots(params: optax.Params, value: ArrayLike) -> optax.Updates:
    """A slot for each parameter, filled with `value`, in the dtype in which its step is computed."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value, dtype=compute_dtype(leaf.dtype)), params)


def _new(new: jax.Array, old: jax.Array) -> jax.Array:
    del old
    return new


def _where(finite: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(finite, new, old)


def _leafwise(
    updates: optax.Updates,
    finite: jax.Array | None,
    rule: Callable[..., tuple[jax.Array | None, ...]],
    numbers: tuple[ArrayLike, ...],
    slots: tuple[Any, ...],
    given: tuple[Any, ...] = (),
) -> tuple[Any, ...]:
    """Applies a rule from (choose, numbers, gradient, slots..., given...) to (update, new slots...) to each leaf.

    It computes in the slots' dtype; the update leaves in the gradient's. Where the step is not finite, a rule chooses
    the old slots and an update of -0.0: adding that changes no bit. A slot may be None in place of its tree.
    """
    gradients, treedef = jax.tree.flatten(updates)
    arrays = tuple(jnp.asarray(number) for number in numbers)
    columns = [[None] * len(gradients) if tree is None else jax.tree.leaves(tree) for tree in (*slots, *given)]
    rows = []
    for gradient, *others in zip(gradients, *columns, strict=True):
        # Traced, leaves of one shape share a trace. Not so in a loop without jit, where it would round otherwise.
        on_leaf = _on_leaf_jitted if isinstance(gradient, jax.core.Tracer) else _on_leaf
        rows.append(on_leaf(rule, len(slots), finite, arrays, gradient, *others))
    if not rows:
        return updates, *slots
    new = [None if column[0] is None else jax.tree.unflatten(treedef, column) for column in zip(*rows, strict=True)]
    return tuple(new)


def _on_leaf(
    rule: Callable[..., tuple[jax.Array | None, ...]],
    slots: int,
    finite: jax.Array | None,
    numbers: tuple[jax.Array, ...],
    gradient: jax.Array,
    *others: jax.Array | None,
) -> tuple[jax.Array | None, ...]:
    dtype = others[0].dtype if slots and others[0] is not None else compute_dtype(gradient.dtype)
    choose = _new if finite is None else functools.partial(_where, finite)
    update, *new = rule(choose, [number.astype(dtype) for number in numbers], gradient.astype(dtype), *others)
    assert update is not None  # what can be None are slots
    return update.astype(gradient.dtype), *new


_on_leaf_jitted = jax.jit(_on_leaf, static_argnums=(0, 1))
