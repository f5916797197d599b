"""Clipping by the global norm: to a constant, or to a limit learned from the norms so far."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optloss._check import check_arity, check_flag, check_number, describe, named_call
from optloss._numerics import compute_dtype, global_norm, scale_tree

__all__ = [
    "AdaptiveClippingState",
    "ClipByFactor",
    "PairsFunction",
    "adaptive_clipping_fn",
    "clip_by_global_norm",
    "clip_stage",
]

PairsFunction: TypeAlias = Callable[[list[tuple[jax.Array, jax.Array]]], Sequence[tuple[jax.Array, jax.Array]]]
ClipGradients: TypeAlias = ArrayLike | optax.GradientTransformation | PairsFunction


class ClipByFactor(optax.GradientTransformationExtraArgs):
    """A transformation that multiplies all updates by one factor of their norm.

    `optimize_loss` calls `factor(norm, state, global_step) -> (factor, state)` with the norm it has already, and takes
    the clipped norms from the factor; elsewhere `update` does both, as for any transformation.
    """

    factor: Callable[[jax.Array, Any, jax.Array | None], tuple[jax.Array, Any]]
    description: str
    """What it is in a few words, for `explain`."""
    warning: str
    """Why it cannot do what it says, or nothing."""


def clip_by_global_norm(clip_norm: ArrayLike) -> ClipByFactor:
    """Scales all updates by one factor so that their global norm is at most `clip_norm`.

        g' = g * min(1, clip_norm / norm),        norm = global_norm(g)

    A norm that is not finite makes every update NaN, so that it cannot pass unseen. Infinity never clips.

    Args:
        clip_norm: The largest norm that passes, >= 0: a number or a scalar array.

    Returns:
        A transformation without state.

    Raises:
        ValueError: `clip_norm` is negative, NaN or no scalar.

    Example:
        >>> clip = optloss.clip_by_global_norm(1.0)
        >>> clipped, _ = clip.update({"w": jnp.array([3.0, 4.0])}, optax.EmptyState())
        >>> clipped["w"]
        Array([0.6, 0.8], dtype=float32)

    TF1 accepted a negative limit (and did not clip) and made NaN of an infinite one, of 0 with zero gradients, and of
    gradients whose squares overflow. Unlike `optax.clip_by_global_norm`, the norm is accumulated in float32 or better
    and right from 1e-30 to 1e30, and one NaN does not leave other updates at 0.
    """
    limit = check_number("clip_norm", clip_norm, at_least=0, infinite=True, wrong_type=ValueError)

    def factor_fn(norm: jax.Array, state: optax.EmptyState, step: Any) -> tuple[jax.Array, optax.EmptyState]:
        del step
        clip_to = jnp.asarray(limit, norm.dtype)
        return _factor(norm, norm > clip_to, clip_to), state

    return _clip_by_factor(lambda params: optax.EmptyState(), factor_fn, *_explain_limit(limit))


class AdaptiveClippingState(NamedTuple):
    """State of `adaptive_clipping_fn`."""

    mean: jax.Array  # shape=(), moving average of the log norm
    variance: jax.Array  # shape=(), moving average of its squared distance from the mean
    step: jax.Array | None  # shape=(), int32: norms averaged so far; None without `global_step`
    max_norm: jax.Array | None  # shape=(), the limit of the last step; None without `report_summary`


def adaptive_clipping_fn(
    std_factor: ArrayLike = 2.0,
    decay: ArrayLike = 0.95,
    static_max_norm: ArrayLike | None = None,
    global_step: bool | None = None,
    report_summary: bool = False,
    epsilon: ArrayLike = 1e-8,
    name: str | None = None,
    *,
    skip_zero_norm: bool = False,
) -> ClipByFactor:
    """Clips the global norm to `std_factor` deviations above the moving average of its logarithm.

    With L = log(norm + epsilon) and d = decay, or d = min(decay, n / (n + 1)) with `global_step` (n = steps before):

        mean     <- d * mean + (1 - d) * L
        variance <- d * (variance + (1 - d) * (L - old mean) ** 2)
        max_norm  = exp(mean + std_factor * sqrt(max(epsilon, variance)))
        factor    = 1 where norm < max_norm, else exp(mean) / norm
        factor    = min(factor, static_max_norm / norm), where that is given

    So a norm above the limit is brought down to the average, and the limit already knows the norm it is held against:
    a `std_factor` beyond sqrt(decay / (1 - decay)), 4.36 by default, never clips. Norms that are not finite make every
    update NaN and are left out of the averages.

    Args:
        std_factor: Deviations above the average at which clipping begins, >= 0.
        decay: Decay of the averages, from 0 to 1.
        static_max_norm: A limit that holds besides, > 0, or None.
        global_step: True starts the averages from the first norm: d = min(decay, n / (n + 1)), where n is the
            pipeline's `global_step` inside `optimize_loss` and this transformation's own count elsewhere. Otherwise
            they start from a norm of 1, and large norms are cut hard in the first steps, as in TF1.
        report_summary: Keeps the limit in the state as `max_norm`; `optimize_loss` then reports it as
            `global_norm/adaptive_max_gradient_norm`.
        epsilon: Added to the norm before the logarithm, and smallest variance, > 0.
        name: TF1's name of the scope; it has no meaning here, where the state's place is its name.
        skip_zero_norm: Leaves norms of exactly 0 out of the averages. TF1 takes them in as log(epsilon) = -18, after
            which nothing is clipped for dozens of steps: set it where whole batches can be masked.

    Returns:
        A transformation whose state is an `AdaptiveClippingState`.

    Raises:
        ValueError: A number outside of its bounds.
        TypeError: A setting of the wrong type.

    Example:
        >>> clip = optloss.adaptive_clipping_fn(global_step=True)
        >>> state = clip.init({"w": jnp.zeros(2)})
        >>> for norm in [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 100.0]:
        ...     clipped, state = clip.update({"w": jnp.array([norm, 0.0])}, state)
        >>> print(f"{clipped['w'][0]:.3f}")
        1.925

    TF1 kept E[L] and E[L**2], whose difference loses all digits for steady norms; the centred form above is the same
    number. TF1 passed the step's tensor as `global_step`. Optax has nothing like it: `optax.adaptive_grad_clip`
    compares each gradient with its parameter.

    Reference:
        Chorowski et al., End-to-end Continuous Speech Recognition using Attention-based Recurrent NN, 2014,
        section 3.2.1 (arXiv:1412.1602).
    """
    del name
    std_factor = check_number("std_factor", std_factor, at_least=0)
    decay = check_number("decay", decay, at_least=0, at_most=1)
    epsilon = check_number("epsilon", epsilon, above=0)
    if static_max_norm is not None:
        static_max_norm = check_number("static_max_norm", static_max_norm, above=0, infinite=True)
    for argument, flag in (
        ("global_step", bool(global_step) if global_step is None else global_step),
        ("report_summary", report_summary),
        ("skip_zero_norm", skip_zero_norm),
    ):
        check_flag(argument, flag)

    def init_fn(params: optax.Params) -> AdaptiveClippingState:
        dtype = compute_dtype(*(leaf.dtype for leaf in jax.tree.leaves(params)))
        return AdaptiveClippingState(
            mean=jnp.zeros((), dtype),
            variance=jnp.zeros((), dtype),
            step=jnp.zeros((), jnp.int32) if global_step else None,
            max_norm=jnp.zeros((), dtype) if report_summary else None,
        )

    def factor_fn(
        norm: jax.Array, state: AdaptiveClippingState, step: jax.Array | None
    ) -> tuple[jax.Array, AdaptiveClippingState]:
        norm = norm.astype(state.mean.dtype)
        new_decay = _constant(decay, norm)
        if state.step is not None:
            n = (state.step if step is None else step).astype(norm.dtype)
            new_decay = jnp.minimum(new_decay, n / (n + 1))
        distance = jnp.log(norm + _constant(epsilon, norm)) - state.mean
        mean = state.mean + distance * (1 - new_decay)
        variance = new_decay * (state.variance + (1 - new_decay) * distance * distance)
        std = jnp.sqrt(jnp.maximum(_constant(epsilon, norm), variance))
        max_norm = jnp.exp(mean + _constant(std_factor, norm) * std)
        factor = _factor(norm, norm >= max_norm, jnp.exp(mean))
        if static_max_norm is not None:
            limit = _constant(static_max_norm, norm)
            factor = jnp.minimum(factor, _factor(norm, norm > limit, limit))
        counted = jnp.isfinite(norm) & ((norm > 0) | (not skip_zero_norm))
        new_state = AdaptiveClippingState(
            jnp.where(counted, mean, state.mean),
            jnp.where(counted, variance, state.variance),
            None if state.step is None else state.step + counted.astype(jnp.int32),
            None if state.max_norm is None else jnp.where(counted, max_norm, state.max_norm),
        )
        return factor, new_state

    return _clip_by_factor(
        init_fn, factor_fn, *_explain_adaptive(std_factor, decay, static_max_norm, bool(global_step))
    )


def _clip_by_factor(
    init_fn: Callable[[optax.Params], Any],
    factor_fn: Callable[[jax.Array, Any, jax.Array | None], tuple[jax.Array, Any]],
    description: str,
    warning: str,
) -> ClipByFactor:
    """Makes the transformation of a function of the norm."""

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        global_step: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        factor, state = factor_fn(global_norm(updates), state, global_step)
        return scale_tree(updates, factor), state

    clip = ClipByFactor(init_fn, update_fn)
    clip.factor, clip.description, clip.warning = factor_fn, description, warning
    return clip


def _explain_limit(limit: float | jax.Array) -> tuple[str, str]:
    """What a clip to a constant is, and why it cannot do what it says."""
    if isinstance(limit, jax.core.Tracer):
        return "clip to a traced norm", ""
    never, always = "a limit of infinity never clips; None would do.", "a limit of 0 makes every gradient 0."
    useless: dict[Any, str] = {math.inf: never, 0: always}
    return f"clip to norm {limit:g}", useless.get(limit, "")


def _explain_adaptive(std_factor: Any, decay: Any, static_max_norm: Any, counts: bool) -> tuple[str, str]:
    if isinstance(std_factor, jax.core.Tracer) or isinstance(decay, jax.core.Tracer):
        return "adaptive clip", ""
    if decay == 1 and not counts:
        return "adaptive clip", "decay=1 without global_step never moves the averages."
    largest = math.sqrt(decay / (1 - decay)) if decay < 1 else math.inf
    if std_factor <= largest:
        return "adaptive clip", ""
    rest = "" if static_max_norm is None else " but to static_max_norm"
    return "adaptive clip", (
        f"std_factor={std_factor:g} is beyond sqrt(decay / (1 - decay)) = {largest:.2f}, where it never clips{rest}."
    )


def _factor(norm: jax.Array, clips: jax.Array, clip_to: jax.Array) -> jax.Array:
    """`clip_to / norm` where it clips, else 1; NaN where the norm is not finite, as in TF1."""
    factor = jnp.where(clips, clip_to / jnp.where(clips, norm, 1), 1)
    return jnp.where(jnp.isfinite(norm), factor, jnp.nan)


def _constant(value: ArrayLike, like: jax.Array) -> jax.Array:
    return jnp.asarray(value, like.dtype)


def clip_stage(clip_gradients: ClipGradients | None) -> optax.GradientTransformationExtraArgs | None:
    """Returns the transformation that the argument `clip_gradients` of `optimize_loss` stands for."""
    if clip_gradients is None:
        return None
    if isinstance(clip_gradients, optax.GradientTransformation):
        return optax.with_extra_args_support(clip_gradients)
    if clip_gradients is adaptive_clipping_fn or clip_gradients is clip_by_global_norm:
        raise TypeError(
            f"clip_gradients: got the function {clip_gradients.__name__} itself; what it returns would do: "
            f"{clip_gradients.__name__}(...)."
        )
    if callable(clip_gradients):
        check_arity("clip_gradients", clip_gradients, ["grads_and_vars"])
        return _clip_pairs(clip_gradients)
    try:
        return clip_by_global_norm(clip_gradients)
    except ValueError as error:
        bound = str(error).removeprefix("clip_norm: ").removesuffix(" would do.")
        raise ValueError(
            f"clip_gradients: {bound}, an Optax transformation, a function of (gradient, parameter) pairs or None "
            "would do."
        ) from error


def _clip_pairs(function: PairsFunction) -> optax.GradientTransformationExtraArgs:
    """Makes the transformation of TF1's form of clipping, a function of a list of (gradient, parameter) pairs."""

    def update_fn(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        leaves, treedef = jax.tree.flatten(updates)
        result = named_call("clip_gradients", function, list(zip(leaves, jax.tree.leaves(params), strict=True)))
        try:
            clipped = [jnp.asarray(gradient) for gradient, _ in result]
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"clip_gradients: {describe(function)} returned {type(result).__name__}; a list of (gradient, "
                "parameter) pairs like the one it got would do."
            ) from error
        shapes, wanted = [x.shape for x in clipped], [x.shape for x in leaves]
        if shapes != wanted:
            raise ValueError(
                f"clip_gradients: {describe(function)} returned gradients of shapes {shapes}; it got {wanted}."
            )
        wrong = [str(x.dtype) for x in clipped if not jnp.issubdtype(x.dtype, jnp.floating)]
        if wrong:
            raise TypeError(
                f"clip_gradients: {describe(function)} returned gradients of dtype {wrong[0]}; reals would do."
            )
        clipped = [new.astype(old.dtype) for new, old in zip(clipped, leaves, strict=True)]
        return jax.tree.unflatten(treedef, clipped), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
