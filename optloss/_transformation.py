"""The pipeline of `optimize_loss` as one Optax transformation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optloss._agreement import check_agreement, check_state
from optloss._check import check_flag, shown
from optloss._clipping import ClipGradients
from optloss._explain import Explanation, explain_pipeline
from optloss._learning_rate import DecayFunction
from optloss._multipliers import Multiplier
from optloss._names import Variables, check_like, parameter_names, select_parameters
from optloss._noise import NoiseScale
from optloss._pipeline import (
    OptState,
    Pipeline,
    build_pipeline,
    dry_run,
    init_stages,
    initial_step,
    next_step,
    run_stages,
)
from optloss._summaries import Summaries
from optloss._trees import choose, colocate, keep, merge, shardings_of

__all__ = ["PipelineTransformation", "TransformationState", "as_transformation", "transformation"]


class TransformationState(NamedTuple):
    """State of the pipeline as a transformation."""

    global_step: jax.Array | None  # shape=(), an integer; None without a counter
    opt_state: OptState
    summaries: Summaries  # of the last step; zeros at first


class PipelineTransformation(optax.GradientTransformationExtraArgs):
    """The pipeline as an Optax transformation, which can explain itself."""

    explain: Callable[[optax.Params], Explanation]
    """`explain(params) -> Explanation`: what it does and which parameter gets what. Shapes will do."""


def transformation(
    global_step: ArrayLike | None,
    learning_rate: ArrayLike | None,
    optimizer: Any,
    gradient_noise_scale: NoiseScale | None = None,
    gradient_multipliers: Mapping[str, Multiplier] | None = None,
    clip_gradients: ClipGradients | None = None,
    learning_rate_decay_fn: DecayFunction | None = None,
    update_ops: Sequence[Callable[..., Any]] | None = None,
    variables: Variables | None = None,
    name: str | None = None,
    summaries: Sequence[str] | None = None,
    colocate_gradients_with_ops: bool = False,
    increment_global_step: bool = True,
    *,
    nonfinite: str = "skip",
    key: ArrayLike | None = None,
    noise_generator: str = "mixer",
    param_specs: Any = None,
    reproducible: bool = False,
) -> PipelineTransformation:
    """Makes the pipeline of `optimize_loss` as one Optax transformation, for loops that have gradients already.

    Args:
        global_step: As in `optimize_loss`, and so are the others.
        learning_rate: As there.
        optimizer: As there. `value`, `grad` and `value_fn` are handed on from `update(..., value=...)`.
        gradient_noise_scale: As there; it needs `key`.
        gradient_multipliers: As there.
        clip_gradients: As there.
        learning_rate_decay_fn: As there.
        update_ops: None or []: there is no model state here.
        variables: As there. The updates of what is not selected are -0.0, which leaves every number as it is.
        name: As there.
        summaries: As there, without the loss. They are in the state, since Optax has no other way out.
        colocate_gradients_with_ops: As there.
        increment_global_step: As there.
        nonfinite: As there; of the loss, what is given as `value` is looked at.
        key: Seed of the noise.
        noise_generator: As there.
        param_specs: As there.
        reproducible: As there.

    Returns:
        A transformation whose state is a `TransformationState`. Its `update` needs the parameters. It has
        `explain(params)`, as a `TrainOp` has.

    Raises:
        ValueError: As in `optimize_loss`.
        TypeError: As in `optimize_loss`.

    Example:
        >>> optimizer = optloss.transformation(0, 0.1, "Adam", clip_gradients=1.0)
        >>> params = {"w": jnp.zeros(2)}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update({"w": jnp.array([3.0, 4.0])}, state, params)
        >>> print(f"{state.summaries['OptimizeLoss/global_norm/gradient_norm']:.1f}")
        5.0

    TF1 had no such function. Unlike an `optax.chain`, frozen parameters are out of all of it and bad steps are skipped.
    """
    if update_ops:
        raise ValueError(
            f"update_ops: got {shown(update_ops)}; a transformation has no model state: None or [] would do."
        )
    check_flag("colocate_gradients_with_ops", colocate_gradients_with_ops)
    pipeline = build_pipeline(
        global_step,
        learning_rate,
        optimizer,
        gradient_noise_scale,
        gradient_multipliers,
        clip_gradients,
        learning_rate_decay_fn,
        variables,
        name,
        summaries,
        increment_global_step,
        nonfinite,
        key,
        noise_generator,
        param_specs,
        reproducible,
    )
    return as_transformation(pipeline, colocate_gradients=colocate_gradients_with_ops)


def as_transformation(pipeline: Pipeline, *, colocate_gradients: bool) -> PipelineTransformation:
    """The pipeline's face for loops that have gradients already."""
    # Without the loss, which comes or does not: the state's tree must not hang on that.
    pipeline = pipeline._replace(summaries=tuple(tag for tag in pipeline.summaries if tag != "loss"))

    def init_fn(params: optax.Params) -> TransformationState:
        step = initial_step(pipeline.global_step)
        opt_state = init_stages(pipeline, params, None)
        summaries = jax.eval_shape(lambda: dry_run(pipeline, params, opt_state, step, None).summaries)
        check_agreement(pipeline, params, opt_state, step, None)
        return TransformationState(step, opt_state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), summaries))

    def update_fn(
        updates: optax.Updates,
        state: TransformationState,
        params: optax.Params | None = None,
        *,
        value: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TransformationState]:
        if params is None:
            raise ValueError("params: got None; the pipeline needs them: update(updates, state, params).")
        if not isinstance(state, TransformationState):
            raise TypeError(f"state: got {type(state).__name__}; the TransformationState that init gave would do.")
        check_state(pipeline, state.opt_state, params)
        selected = select_parameters(pipeline.variables, params)
        trained, (gradients, are_trained) = keep(params, selected), _gradients_of(updates, params, selected)
        if colocate_gradients:
            gradients = colocate(gradients, shardings_of(trained))
        if value is not None:
            extra_args["value"] = value
        if "grad" in extra_args:
            extra_args["grad"] = keep(extra_args["grad"], selected)
        if "value_fn" in extra_args:
            value_fn = extra_args["value_fn"]
            extra_args["value_fn"] = lambda trained: value_fn(merge(trained, params, selected))
        finite = jnp.ones((), bool) if value is None else jnp.isfinite(value)
        step, opt_state = state.global_step, state.opt_state
        result = run_stages(pipeline, gradients, opt_state, trained, step, value, finite, **extra_args)
        new_step = next_step(step, pipeline)
        if pipeline.skips_nonfinite:
            new_step = choose(result.finite, new_step, step)
        # Not 0.0: adding that would make 0.0 of -0.0.
        nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates)
        return merge(result.updates, nothing, are_trained), TransformationState(
            new_step, result.state, result.summaries
        )

    face = PipelineTransformation(init_fn, update_fn)
    face.explain = lambda params: explain_pipeline(pipeline, (), params)
    return face


def _gradients_of(updates: optax.Updates, params: optax.Params, selected: list[bool]) -> tuple[Any, list[bool]]:
    """The gradients of the trained parameters, in their tree, and which of the updates they are.

    Raises:
        ValueError: One is missing, or has another shape than its parameter.
        TypeError: One is not real.
    """
    trained, names = keep(params, selected), parameter_names(params)
    chosen = {name for name, is_trained in zip(names, selected, strict=True) if is_trained}
    given = dict(zip(parameter_names(updates), jax.tree.leaves(updates), strict=True))
    check_like("updates: the gradient of", {name: given[name] for name in given if name in chosen}, trained)
    for name, leaf in given.items():
        if name not in names:
            raise ValueError(f"updates: there is a gradient of {shown(name)}, and no such parameter.")
        if name in chosen and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"updates: the gradient of {shown(name)} is {leaf.dtype}; a real one would do.")
    gradients = jax.tree.unflatten(jax.tree.structure(trained), [given[name] for name in names if name in chosen])
    return gradients, [name in chosen for name in given]
