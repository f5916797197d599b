"""The pipeline of a step: noise, multipliers, clip, optimizer and their figures, built once for both faces."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optloss._axes import (
    AxisNames,
    all_along,
    axes_along,
    check_param_specs,
    spec_leaves,
    varying_axes,
)
from optloss._check import check_choice, check_flag, named_call, shown
from optloss._clipping import AdaptiveClippingState, ClipByFactor, ClipGradients, clip_stage
from optloss._fingerprint import fingerprint
from optloss._learning_rate import DecayFunction, check_decay, check_learning_rate, decayed_rate
from optloss._multipliers import Multiplier, MultiplyByFactors, multiply_gradients
from optloss._names import Variables, check_like, check_variables, parameter_names, select_parameters
from optloss._noise import NOISE_GENERATORS, NoiseScale, add_gradient_noise, check_key, check_noise_scale, scoped_key
from optloss._numerics import compute_dtype, leaf_norms, round_apart, scale_tree
from optloss._optimizer_forms import OptimizerFunction, optimizer_function
from optloss._rule import GuardedOptimizer
from optloss._summaries import StepFigures, Summaries, check_summaries, summarize
from optloss._trees import choose, is_inexact, keep, keep_types, still_finite, strong_array

__all__ = [
    "OptState",
    "Pipeline",
    "StepResult",
    "axes_of_params",
    "build_pipeline",
    "dry_run",
    "init_stages",
    "initial_step",
    "next_step",
    "run_stages",
]


class OptState(NamedTuple):
    """What one train op carries from step to step."""

    learning_rate: jax.Array | None  # shape=(), before its decay; may be changed between steps
    noise: optax.OptState  # a GradientNoiseState where there is noise
    multipliers: optax.OptState
    clip: optax.OptState  # an AdaptiveClippingState for adaptive clipping
    optimizer: optax.OptState
    nonfinite_steps: jax.Array  # shape=(), int32: steps that changed nothing, since something was not finite
    fingerprint: jax.Array  # shape=(settings, 2), uint32: of settings and parameters, for `restore`; never changes


class StepResult(NamedTuple):
    """What the pipeline makes of gradients."""

    updates: optax.Updates  # -0.0 where the step is skipped
    state: OptState
    summaries: Summaries
    finite: jax.Array  # shape=(), bool: what came, the gradient norm, the updates, the new state and parameters


class Pipeline(NamedTuple):
    """The checked settings of a train op. Trees of trained parameters have None in the other places."""

    name: str
    global_step: int | jax.Array | None
    learning_rate: ArrayLike | None
    noise: Callable[[ArrayLike], optax.GradientTransformationExtraArgs] | None  # of the key
    multiply: optax.GradientTransformationExtraArgs
    clip: optax.GradientTransformationExtraArgs | None
    learning_rate_decay_fn: DecayFunction | None
    optimizer: OptimizerFunction
    variables: Variables | None
    summaries: tuple[str, ...]
    increment_global_step: bool
    skips_nonfinite: bool
    key: ArrayLike | None
    param_specs: Any
    reproducible: bool
    settings: dict[str, Any]  # as they were given


def build_pipeline(
    global_step: ArrayLike | None,
    learning_rate: ArrayLike | None,
    optimizer: Any,
    gradient_noise_scale: NoiseScale | None,
    gradient_multipliers: Mapping[str, Multiplier] | None,
    clip_gradients: ClipGradients | None,
    learning_rate_decay_fn: DecayFunction | None,
    variables: Variables | None,
    name: str | None,
    summaries: Sequence[str] | None,
    increment_global_step: bool,
    nonfinite: str,
    key: ArrayLike | None,
    noise_generator: str,
    param_specs: Any,
    reproducible: bool,
) -> Pipeline:
    """Checks every setting and builds the stages of the step. Makes no array."""
    settings = dict(locals())
    rate = None if learning_rate is None else check_learning_rate("learning_rate", learning_rate)
    if rate is None:
        learning_rate_decay_fn = None  # as in TF1, where it is not called without a rate
    elif learning_rate_decay_fn is not None and global_step is None:
        raise ValueError("global_step: global_step is required for learning_rate_decay_fn; an integer would do.")
    check_decay("learning_rate_decay_fn", learning_rate_decay_fn)
    check_variables(variables)
    check_param_specs(param_specs)
    if key is not None:
        check_key("key", key)
    multiply = optax.identity() if gradient_multipliers is None else multiply_gradients(gradient_multipliers)
    return Pipeline(
        name=_check_name(name),
        global_step=_check_global_step(global_step),
        learning_rate=rate,
        noise=_noise_stage(gradient_noise_scale, noise_generator, param_specs),
        multiply=optax.with_extra_args_support(multiply),
        clip=clip_stage(clip_gradients),
        learning_rate_decay_fn=learning_rate_decay_fn,
        optimizer=optimizer_function(optimizer, rate),
        variables=variables,
        summaries=check_summaries(summaries),
        increment_global_step=check_flag("increment_global_step", increment_global_step),
        skips_nonfinite=check_choice("nonfinite", nonfinite, ("skip", "apply")) == "skip",
        key=key,
        param_specs=param_specs,
        reproducible=check_flag("reproducible", reproducible),
        settings=settings,
    )


def init_stages(pipeline: Pipeline, params: optax.Params, key: ArrayLike | None) -> OptState:
    """Returns the state of every stage for these parameters."""
    trained = keep(params, select_parameters(pipeline.variables, params))
    widest = compute_dtype(*(leaf.dtype for leaf in jax.tree.leaves(trained)))
    rate = None if pipeline.learning_rate is None else jnp.asarray(pipeline.learning_rate, widest)
    any_rate: Any = None if rate is None else 1.0
    state = OptState(
        learning_rate=rate,
        noise=_init_noise(pipeline, trained, pipeline.key if key is None else key),
        multipliers=pipeline.multiply.init(params),  # all of them: a multiplier may name what is not trained here
        clip=optax.EmptyState() if pipeline.clip is None else _named_init("clip_gradients", pipeline.clip, trained),
        optimizer=_named_init("optimizer", pipeline.optimizer(rate), trained),
        nonfinite_steps=jnp.zeros((), jnp.int32),
        fingerprint=jnp.asarray(fingerprint(pipeline.settings, pipeline.optimizer(any_rate), params)),
    )
    return OptState(*jax.tree.map(strong_array, tuple(state)))


def _named_init(argument: str, transformation: optax.GradientTransformation, params: optax.Params) -> Any:
    return named_call(argument, transformation.init, params, name="its init")


def _init_noise(pipeline: Pipeline, trained: optax.Params, key: ArrayLike | None) -> optax.OptState:
    if pipeline.noise is None:
        return optax.EmptyState()
    if key is None:
        raise ValueError(
            "key: got None, but gradient_noise_scale needs one; a seed would do: init(params, key=0), or key=0 where "
            "the op is built."
        )
    check_key("key", key)
    return pipeline.noise(scoped_key(key, pipeline.name)).init(trained)


def run_stages(
    pipeline: Pipeline,
    gradients: optax.Updates,
    state: OptState,
    params: optax.Params,
    global_step: jax.Array | None,
    loss: jax.Array | None,
    finite: jax.Array,
    **extra_args: Any,
) -> StepResult:
    """Makes updates of gradients, in the original's order; `params` are the trained ones.

    `finite` says whether all else that the caller is about to change stays finite.
    """
    along = axes_of_params(pipeline, params)
    _check_axes("updates: the gradient of", gradients, along)
    stage_args = extra_args if global_step is None else {**extra_args, "global_step": global_step}
    noisy, noise = gradients, state.noise
    if pipeline.noise is not None:
        noisy, noise = pipeline.noise(0).update(gradients, state.noise, params, **stage_args)  # the key is in the state

    def multiply(gradients: optax.Updates) -> optax.Updates:
        return pipeline.multiply.update(gradients, state.multipliers, params, **stage_args)[0]

    _, multipliers = pipeline.multiply.update(noisy, state.multipliers, params, **stage_args)
    factors = None
    if isinstance(pipeline.multiply, MultiplyByFactors):
        factors = pipeline.multiply.factors(noisy, state.multipliers, global_step)
    norms = functools.partial(leaf_norms, along=along, exact=pipeline.reproducible)
    clipped = _clip(pipeline.clip, norms, noisy, factors, multiply, state.clip, params, stage_args)
    _check_axes("clip_gradients: the clipped gradient of", clipped.gradients, along)
    clip = keep_types("clip_gradients", clipped.state, state.clip)
    if pipeline.reproducible:
        rescale = clipped.rescale
        clipped = clipped._replace(rescale=lambda gradients: round_apart(rescale(gradients), state.nonfinite_steps))
    rate = state.learning_rate
    if rate is not None:
        rate = decayed_rate(rate, global_step, pipeline.learning_rate_decay_fn)
    finite &= jnp.isfinite(clipped.before)
    finite = still_finite(finite, (noise, multipliers, clip), (state.noise, state.multipliers, state.clip))
    optimizer = pipeline.optimizer(rate)
    if isinstance(optimizer, GuardedOptimizer) and _is_wide((gradients, params)):
        finite = all_along(finite, ())
        updates, optimizer_state, finite = _guarded_update(pipeline, optimizer, clipped, state, params, finite)
    else:
        # Without the step: a line search refuses arguments that it does not know.
        updates, optimizer_state, finite = _update_and_look(
            pipeline, optimizer, clipped, state, params, finite, along, extra_args
        )
    count = state.nonfinite_steps + (~finite).astype(jnp.int32)
    if pipeline.skips_nonfinite:
        before = (state.noise, state.multipliers, state.clip)
        noise, multipliers, clip = choose(finite, (noise, multipliers, clip), before)
    figures = StepFigures(
        loss=loss,
        learning_rate=None if pipeline.learning_rate_decay_fn is None else rate,
        names=parameter_names(gradients),
        gradients=jax.tree.leaves(clipped.rescale(clipped.gradients)),
        along=along,
        gradient_norms=clipped.leaves,
        norm=clipped.before,
        clipped_norm=clipped.after,
        max_norm=_max_norm(clip),
        nonfinite_steps=count,
    )
    new_state = OptState(state.learning_rate, noise, multipliers, clip, optimizer_state, count, state.fingerprint)
    return StepResult(updates, new_state, summarize(pipeline.summaries, pipeline.name, figures), finite)


class _Clipped(NamedTuple):
    """Gradients after the clip, and the norms."""

    gradients: optax.Updates  # not yet rescaled
    rescale: Callable[[optax.Updates], optax.Updates]  # by multiplier and factor, where it is used: it is not stored
    state: optax.OptState
    before: jax.Array  # norm of all gradients
    after: jax.Array | None  # norm of all clipped gradients; None without clipping
    leaves: list[jax.Array]  # norm of each clipped gradient


def axes_of_params(pipeline: Pipeline, params: optax.Params) -> list[AxisNames]:
    """The axes of a `shard_map` along which each of the trained parameters is cut."""
    return axes_along(parameter_names(params), jax.tree.leaves(params), spec_leaves(pipeline.param_specs, params))


def _check_axes(what: str, gradients: optax.Updates, along: list[AxisNames]) -> None:
    """Raises a ValueError where a gradient differs along axes along which its parameter is the same."""
    for name, leaf, own in zip(parameter_names(gradients), jax.tree.leaves(gradients), along, strict=True):
        others = sorted(varying_axes(leaf) - set(own), key=str)
        if others:
            raise ValueError(
                f"{what} {name!r} differs along {', '.join(map(repr, others))}, its parameter does not; its mean or "
                "sum over that would do: axis_name=... for optimize_loss."
            )


def _clip(
    clip: optax.GradientTransformationExtraArgs | None,
    norms: Callable[..., tuple[list[jax.Array], jax.Array]],
    gradients: optax.Updates,
    factors: list[jax.Array | None] | None,
    multiply: Callable[[optax.Updates], optax.Updates],
    state: optax.OptState,
    params: optax.Params,
    extra_args: dict[str, Any],
) -> _Clipped:
    """Clips, and gives the norms: after a clip by a factor they come from the factor, without a second pass."""
    leaves, norm = norms(gradients, factors)
    if clip is None:
        return _Clipped(gradients, multiply, state, norm, None, leaves)
    if isinstance(clip, ClipByFactor):
        factor, state = clip.factor(norm, state, extra_args.get("global_step"))

        def rescale(gradients: optax.Updates) -> optax.Updates:
            return scale_tree(multiply(gradients), factor)

        return _Clipped(gradients, rescale, state, norm, norm * factor, [leaf * factor for leaf in leaves])
    clipped, state = _named_update("clip_gradients", clip, multiply(gradients), state, params, extra_args)
    check_like("clip_gradients: its gradient of", clipped, gradients)
    gradients = clipped
    clipped_leaves, clipped_norm = norms(gradients)
    return _Clipped(gradients, lambda gradients: gradients, state, norm, clipped_norm, clipped_leaves)


def _named_update(
    argument: str,
    transformation: optax.GradientTransformationExtraArgs,
    gradients: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """An update whose errors name the argument."""
    result = named_call(argument, transformation.update, gradients, state, params, name="its update", **extra_args)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{argument}: its update returned {type(result).__name__}; (updates, state) would do.")
    return result


def _is_wide(trees: Any) -> bool:
    """Whether each leaf reaches as far as float32, as the bounds of a guarded optimizer take for granted."""
    return all(float(jnp.finfo(leaf.dtype).max) > 1e38 for leaf in jax.tree.leaves(trees) if is_inexact(leaf))


def _guarded_update(
    pipeline: Pipeline,
    optimizer: GuardedOptimizer,
    clipped: _Clipped,
    state: OptState,
    params: optax.Params,
    finite: jax.Array,
) -> tuple[optax.Updates, optax.OptState, jax.Array]:
    """Decides first, by bounds alone; then the optimizer writes in place."""
    gradients = clipped.rescale(clipped.gradients)
    finite &= optimizer.is_safe(clipped.before if clipped.after is None else clipped.after, gradients)
    if pipeline.skips_nonfinite:
        return *optimizer.guarded_update(finite, gradients, state.optimizer, params), finite
    return *optimizer.update(gradients, state.optimizer, params), finite


def _update_and_look(
    pipeline: Pipeline,
    optimizer: optax.GradientTransformationExtraArgs,
    clipped: _Clipped,
    state: OptState,
    params: optax.Params,
    finite: jax.Array,
    along: list[AxisNames],
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState, jax.Array]:
    """For any optimizer: makes the new state beside the old one, looks at it, and keeps one of them."""
    gradients = clipped.rescale(clipped.gradients)
    updates, new = _named_update("optimizer", optimizer, gradients, state.optimizer, params, extra_args)
    check_like("optimizer: its update of", updates, gradients)
    updates = jax.tree.map(lambda update, gradient: update.astype(gradient.dtype), updates, gradients)
    new = keep_types("optimizer", new, state.optimizer)
    applied = optax.apply_updates(params, updates)
    finite = still_finite(finite, (updates, applied, new), (gradients, params, state.optimizer))
    finite = all_along(finite, along)
    if pipeline.skips_nonfinite:
        # Not 0.0: adding that would make 0.0 of -0.0.
        nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates)
        updates, new = choose(finite, (updates, new), (nothing, state.optimizer))
    return updates, new, finite


def dry_run(
    pipeline: Pipeline,
    params: optax.Params,
    state: OptState,
    global_step: jax.Array | None,
    loss: jax.Array | None,
) -> StepResult:
    """Runs the stages on stand-ins, for the shapes of what they give and the errors of what they meet."""
    trained = keep(params, select_parameters(pipeline.variables, params))
    zero = jnp.zeros((), jnp.float32)
    extra = {"value": zero, "grad": trained, "value_fn": lambda params: zero}
    return run_stages(pipeline, trained, state, trained, global_step, loss, jnp.ones((), bool), **extra)


def _noise_stage(
    scale: NoiseScale | None, generator: str, param_specs: Any
) -> Callable[[ArrayLike], optax.GradientTransformationExtraArgs] | None:
    check_choice("noise_generator", generator, NOISE_GENERATORS)
    if scale is None or (isinstance(scale, int | float) and not isinstance(scale, bool) and scale == 0):
        return None
    check_noise_scale("gradient_noise_scale", scale)
    return lambda key: add_gradient_noise(scale, key, generator=generator, param_specs=param_specs)


def _check_name(name: str | None) -> str:
    """Returns the scope of an op's state and tags, as TF1 named it."""
    if name is None:
        return "OptimizeLoss"
    if not isinstance(name, str):
        raise TypeError(f"name: got {shown(name)} of type {type(name).__name__}; a string would do.")
    if not name:
        raise ValueError("name: got ''; a scope for the op's state and tags, or None for 'OptimizeLoss', would do.")
    if not name.isprintable():  # it stands in tags and progress bars
        raise ValueError(f"name: got {shown(name)}; printable characters would do.")
    return name


def _check_global_step(global_step: ArrayLike | None) -> int | jax.Array | None:
    """Returns the first step; raises TF1's TypeErrors for what is no integer or no scalar."""
    if global_step is None:
        return None
    expected = "an integer scalar >= 0, or None for no counter, would do."
    shape = np.shape(global_step)
    dtype = getattr(global_step, "dtype", np.dtype(int) if type(global_step) is int else None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"global_step: got {shown(global_step)}, which does not have integer type; {expected}")
    if shape != ():
        raise TypeError(f"global_step: got an array of shape {shape}, which is not scalar; {expected}")
    if isinstance(global_step, jax.core.Tracer):
        return global_step
    first: int = np.asarray(global_step).item()
    if first < 0:
        raise ValueError(f"global_step: got {first}; {expected}")
    return first


def initial_step(global_step: int | jax.Array | None) -> jax.Array | None:
    """The counter of a new state: int32, or int64 where x64 is enabled."""
    if global_step is None:
        return None
    dtype = jax.dtypes.canonicalize_dtype(np.int64)
    if isinstance(global_step, int) and global_step > np.iinfo(dtype).max:
        raise ValueError(f"global_step: got {global_step}, too large for {dtype}; enable jax_enable_x64.")
    return jnp.asarray(global_step, dtype)


def next_step(global_step: jax.Array | None, pipeline: Pipeline) -> jax.Array | None:
    """The counter after a step; it stays at the largest integer."""
    if global_step is None or not pipeline.increment_global_step:
        return global_step
    return jnp.asarray(optax.safe_increment(global_step))


def _max_norm(clip_state: optax.OptState) -> jax.Array | None:
    """The limit of an adaptive clip, where one in the clip's state reports it."""
    states = jax.tree.leaves(clip_state, is_leaf=lambda node: isinstance(node, AdaptiveClippingState))
    found = [state.max_norm for state in states if isinstance(state, AdaptiveClippingState)]
    return found[0] if found else None
