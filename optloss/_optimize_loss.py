"""`optimize_loss`: checks, differentiates, runs the pipeline and jits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optloss._agreement import check_agreement, check_state
from optloss._axes import AxisNames, check_axis_name, mean_of_losses, mean_over, vary, varying_axes
from optloss._check import check_flag, describe, shown
from optloss._clipping import ClipGradients
from optloss._explain import Explanation, explain_pipeline
from optloss._learning_rate import DecayFunction
from optloss._multipliers import Multiplier
from optloss._names import Variables, parameter_names, select_parameters
from optloss._noise import NoiseScale, check_key
from optloss._pipeline import (
    Pipeline,
    axes_of_params,
    build_pipeline,
    dry_run,
    init_stages,
    initial_step,
    next_step,
    run_stages,
)
from optloss._summaries import Summaries
from optloss._train_state import TrainState, own, spread_over_mesh, unshared
from optloss._transformation import PipelineTransformation, as_transformation
from optloss._trees import choose, colocate, keep, keep_types, merge, shardings_of, still_finite
from optloss._update import check_alive, jit_update

__all__ = ["TrainOp", "TrainOutput", "optimize_loss"]

UpdateOp = Callable[..., Any]


class TrainOutput(NamedTuple):
    """What a step gives besides the new state."""

    loss: jax.Array  # shape=(), before the update
    aux: Any  # what the loss returned besides; None without `has_aux`
    summaries: Summaries  # scalars and histograms under the original's tags


class TrainOp(NamedTuple):
    """A train op: pure functions, as `optimize_loss` makes them."""

    init: Callable[..., TrainState]
    """`init(params, *args, key=None, model_state=None) -> TrainState`.

    `params` is a tree of parameters, or a `TrainState` that this op joins. Arrays are copied, so that what was given
    stays alive. With `args`, those of the loss, the loss too is checked here. `key` is for the noise.
    """

    update: Callable[..., tuple[TrainState, TrainOutput]]
    """`update(state, *args, **kwargs) -> (state, output)`, jitted; the state is donated, the rest goes to the loss."""

    transformation: PipelineTransformation
    """The same pipeline without the loss, for loops that have gradients already."""

    explain: Callable[[Any], Explanation]
    """`explain(params) -> Explanation`: what the op does and which parameter gets what. Shapes or a state will do."""


class _Settings(NamedTuple):
    """What concerns the loss and not the pipeline."""

    loss: Callable[..., Any]
    update_ops: tuple[UpdateOp, ...] | None
    has_aux: bool
    axes: AxisNames  # of `axis_name`
    shardings: tuple[Any, ...] | None = None  # of all parameters, where gradients are held to them


def optimize_loss(
    loss: Callable[..., Any],
    global_step: ArrayLike | None,
    learning_rate: ArrayLike | None,
    optimizer: Any,
    gradient_noise_scale: NoiseScale | None = None,
    gradient_multipliers: Mapping[str, Multiplier] | None = None,
    clip_gradients: ClipGradients | None = None,
    learning_rate_decay_fn: DecayFunction | None = None,
    update_ops: Sequence[UpdateOp] | None = None,
    variables: Variables | None = None,
    name: str | None = None,
    summaries: Sequence[str] | None = None,
    colocate_gradients_with_ops: bool = False,
    increment_global_step: bool = True,
    *,
    has_aux: bool = False,
    axis_name: Any = None,
    nonfinite: str = "skip",
    key: ArrayLike | None = None,
    noise_generator: str = "mixer",
    param_specs: Any = None,
    reproducible: bool = False,
) -> TrainOp:
    """Makes the training update of a loss, whole: one pure, jitted function.

    A step differentiates the loss with respect to the trained parameters and then, in this order, takes the mean over
    `axis_name`, adds noise, multiplies, clips, lets the optimizer step with the decayed rate, and adds 1 to the step.
    Every setting is checked here and in `init`; nothing runs and no array is made here.

    Args:
        loss: Pure function `(params, *args, **kwargs) -> scalar`; with `has_aux`, `-> (scalar, aux)`. With a model
            state it is `(params, model_state, *args, **kwargs) -> (scalar, model_state)`, or, with `has_aux`,
            `-> (scalar, (model_state, aux))`.
        global_step: Integer to count from, or None for no counter. The decay sees the step before its increment.
        learning_rate: Number >= 0, scalar array (traced too), or None. It is kept in the state, in float32 or, where
            parameters are, float64: another one can be put there without a recompilation, or one for each lane of a
            `vmap`.
        optimizer: One of `OPTIMIZER_CLS_NAMES`, with the original's numbers; an Optax function's name, such as "adamw";
            a function of the rate, or of nothing where the rate is None; or a `GradientTransformation`, which the rate
            then does not concern. One that wants `value`, `grad` or `value_fn` is given them.
        gradient_noise_scale: Scale of the noise, a number >= 0 or function of the step. See `add_gradient_noise`.
        gradient_multipliers: Factors by name or pattern of parameters. See `multiply_gradients`.
        clip_gradients: Largest global norm, a number >= 0; or a transformation, as `adaptive_clipping_fn` makes; or a
            function from a list of (gradient, parameter) pairs to the same with other gradients.
        learning_rate_decay_fn: `(learning_rate, global_step) -> learning_rate`; not called where the rate is None.
        update_ops: Pure functions `(model_state, *args, **kwargs) -> model_state`, run in order before the loss. None
            takes the model state that the loss returns; `[]` keeps it as it is.
        variables: What is trained: names and patterns, a function of a name, or a tree of booleans; None is all. The
            rest has no gradient, noise, norm or slots and stays as it is. Integers are never trained.
        name: Scope of the op's state and of its tags; None is "OptimizeLoss". Ops on one state need different ones.
        summaries: Names from `OPTIMIZER_SUMMARIES`; None is loss, learning_rate and global_gradient_norm.
        colocate_gradients_with_ops: Holds each gradient to its parameter's sharding. Inside another jit or scan that is
            known of explicit meshes alone.
        increment_global_step: Whether this op adds 1 to the step.
        has_aux: Whether the loss returns something besides, which comes out as `output.aux`.
        axis_name: Name of the axis, or names of the axes, of a `pmap`, `vmap` or `shard_map` over which gradients,
            loss, model state and the scalars of aux are averaged.
        nonfinite: "skip": a step whose loss, gradient norm, update or new state is not finite changes nothing but the
            count of such steps; "apply": it is applied, as in the original. The six optimizers but Ftrl tell by bounds,
            before they write: a clipped norm above 1e15 (SGD: an update above 1e30) is too near to overflow for them.
        key: Default for the `key` of `init`, and the seed of `transformation`.
        noise_generator: "mixer", or "threefry" for `jax.random`'s own, which is slower. See `add_gradient_noise`.
        param_specs: Inside `shard_map`, the PartitionSpecs of the parameters, as its `in_specs` have them: a tree, or
            a prefix of one; None is whole parameters. Outside of it arrays are whole, and it says nothing.
        reproducible: Whether equal gradients give the same bits however the arrays lie on devices: norms are then
            accumulated in float64. Else norms may differ by 3 ulp. See `global_norm`.

    Returns:
        A `TrainOp` of `init`, `update`, `transformation` and `explain`.

    Raises:
        ValueError: A value that will not do, wherever the original raised it and for nonsense that it let pass.
        TypeError: A value of the wrong type. Both name the argument, what came and what would do.

    Example:
        >>> def loss(params, x, y):
        ...     return jnp.mean((params["w"] * x + params["b"] - y) ** 2)
        >>> train = optloss.optimize_loss(loss, global_step=0, learning_rate=0.1, optimizer="Adam", clip_gradients=1.0)
        >>> state = train.init({"w": 0.0, "b": 0.0})
        >>> x = jnp.arange(4.0)
        >>> for _ in range(200):
        ...     state, out = train.update(state, x, 2 * x + 1)
        >>> print(f"{state.params['w']:.1f} {state.params['b']:.1f} after {state.global_step} steps")
        2.0 1.0 after 200 steps

    TF1 found parameters, step, update ops and summaries in the graph and returned the loss tensor; here they come and
    go by the arguments. Optax has no such function: it is `optax.chain` with the order fixed, the norm computed once,
    and figures as an output.

    Reference:
        `tf.contrib.layers.optimize_loss`, TensorFlow 1.15.
    """
    settings = _check_settings(loss, update_ops, has_aux, axis_name)
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

    def init(params: Any, *args: Any, key: ArrayLike | None = None, model_state: Any = None) -> TrainState:
        state = _initial_state(pipeline, settings, params, model_state, key)
        _check_state(pipeline, settings, state, args)
        return state

    def step(
        shardings: tuple[Any, ...] | None, state: TrainState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[TrainState, TrainOutput]:
        return _step(pipeline, settings._replace(shardings=shardings), state, args, kwargs)

    def shardings(state: TrainState) -> tuple[Any, ...] | None:
        """How the parameters lie: inside a program a sharding over an Auto mesh cannot be seen."""
        return shardings_of(_with_op(pipeline, state).params) if colocate_gradients_with_ops else None

    return TrainOp(
        init,
        jit_update(step, shardings),
        as_transformation(pipeline, colocate_gradients=colocate_gradients_with_ops),
        lambda params: explain_pipeline(
            pipeline, settings.axes, params.params if isinstance(params, TrainState) else params
        ),
    )


def _check_settings(
    loss: Callable[..., Any],
    update_ops: Sequence[UpdateOp] | None,
    has_aux: bool,
    axis_name: Any,
) -> _Settings:
    """Raises what can be said of the loss and its surroundings before it runs."""
    if not callable(loss):
        raise ValueError(
            f"loss: got {shown(loss)} of type {type(loss).__name__}; a function (params, *args) -> scalar would do."
        )
    check_flag("has_aux", has_aux)
    if update_ops is not None:
        if not isinstance(update_ops, list | tuple):
            raise TypeError(f"update_ops: got {shown(update_ops)}; a list of functions of the model state would do.")
        for op in update_ops:
            if not callable(op):
                raise TypeError(f"update_ops: got {shown(op)} among them; functions of the model state would do.")
    return _Settings(loss, None if update_ops is None else tuple(update_ops), has_aux, check_axis_name(axis_name))


def _initial_state(
    pipeline: Pipeline, settings: _Settings, params: Any, model_state: Any, key: ArrayLike | None
) -> TrainState:
    """A new state, or the given one with this op's part."""
    if key is not None:
        check_key("key", key)
    if isinstance(params, TrainState):
        state = params
        check_alive(state)
        if pipeline.name in state.opt_states:
            raise ValueError(
                f"name: the state has an op named {pipeline.name!r} already; another name for this one would do."
            )
        if model_state is not None and state.model_state is not None:
            raise ValueError("model_state: the state that is joined has one already; None would do.")
        if state.global_step is None:
            state = state._replace(global_step=initial_step(pipeline.global_step))
        if model_state is not None:
            state = state._replace(model_state=own("model_state", model_state))
    else:
        step = initial_step(pipeline.global_step)
        state = TrainState(step, own("params", params), own("model_state", model_state), {})
    if settings.update_ops and state.model_state is None:
        raise ValueError("update_ops: there is no model state for them; init(params, model_state=...) would do.")
    opt_state = unshared(init_stages(pipeline, state.params, key), state)
    # Before processes put anything on devices of all of them.
    check_agreement(pipeline, state.params, opt_state, state.global_step, key, state.model_state)
    return spread_over_mesh(state._replace(opt_states={**state.opt_states, pipeline.name: opt_state}))


def _check_state(pipeline: Pipeline, settings: _Settings, state: TrainState, args: tuple[Any, ...]) -> None:
    """Traces a step, of the whole where the loss has its arguments, so that what is wrong is said now."""
    if not args:
        opt_state = state.opt_states[pipeline.name]
        zero = jnp.zeros((), jnp.float32)
        jax.eval_shape(lambda: dry_run(pipeline, state.params, opt_state, state.global_step, zero).summaries)
        return
    alone = settings._replace(axes=())  # there need be no axis here
    jax.eval_shape(lambda state, args: _step(pipeline, alone, state, args, {}), state, args)
    selected = select_parameters(pipeline.variables, state.params)
    value = _loss_of_trained(alone, state.params, selected, state.model_state, args, {})
    trained = keep(state.params, selected)
    if not _depends(lambda one: jax.vjp(lambda trained: value(trained)[0], trained)[1](one), jnp.ones(())):
        names = [n for n, chosen in zip(parameter_names(state.params), selected, strict=True) if chosen]
        raise ValueError(
            f"loss: No gradients provided for any variable: {describe(settings.loss)} does not depend on {names}."
        )


def _depends(function: Callable[[Any], Any], argument: Any) -> bool:
    """Whether a result of a function hangs on its argument, as far as its operations show."""
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    reached = {id(variable) for variable in jaxpr.invars}
    for equation in jaxpr.eqns:
        if any(id(variable) in reached for variable in equation.invars):
            reached.update(id(variable) for variable in equation.outvars)
    return any(id(variable) in reached for variable in jaxpr.outvars)


def _step(
    pipeline: Pipeline, settings: _Settings, state: TrainState, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[TrainState, TrainOutput]:
    """One training step."""
    opt_state = _with_op(pipeline, state).opt_states[pipeline.name]
    check_state(pipeline, opt_state, state.params)
    if pipeline.learning_rate_decay_fn is not None and state.global_step is None:
        raise ValueError("state: it has no global_step, which learning_rate_decay_fn needs.")
    selected = select_parameters(pipeline.variables, state.params)
    trained = keep(state.params, selected)
    model_state = state.model_state
    for op in settings.update_ops or ():
        model_state = keep_types("update_ops", op(model_state, *args, **kwargs), state.model_state)
    value = _loss_of_trained(settings, state.params, selected, model_state, args, kwargs)
    along = axes_of_params(pipeline, trained)
    # Each device by itself: where types tell what differs, gradients of what does not would come added up.
    own = vary(trained, settings.axes)
    (loss, (model_state, aux)), gradients = jax.value_and_grad(value, has_aux=True)(own)
    gradients = mean_of_losses(gradients, along, settings.axes)
    loss, model_state = mean_over((loss, model_state), settings.axes)
    aux = mean_over(aux, settings.axes, scalars_only=True)
    _check_axes_of_loss(loss)
    if settings.shardings is not None:
        kept = [sharding for sharding, chosen in zip(settings.shardings, selected, strict=True) if chosen]
        gradients = colocate(gradients, kept)
    finite = still_finite(jnp.isfinite(loss), model_state, state.model_state)
    result = run_stages(
        pipeline,
        gradients,
        opt_state,
        trained,
        state.global_step,
        loss,
        finite,
        value=loss,
        grad=gradients,
        value_fn=lambda trained: mean_over(value(trained)[0], settings.axes),
    )
    step = next_step(state.global_step, pipeline)
    if pipeline.skips_nonfinite:
        before = (state.global_step, state.model_state)
        step, model_state = choose(result.finite, (step, model_state), before)
    params = merge(optax.apply_updates(trained, result.updates), state.params, selected)
    opt_states = {**state.opt_states, pipeline.name: result.state}
    return TrainState(step, params, model_state, opt_states), TrainOutput(loss, aux, result.summaries)


def _with_op(pipeline: Pipeline, state: TrainState) -> TrainState:
    """The state; raises an error where it has no part of this op."""
    if not isinstance(state, TrainState):
        raise TypeError(f"state: got {type(state).__name__}; the TrainState that init or update gave would do.")
    if pipeline.name not in state.opt_states:
        raise ValueError(
            f"state: it has no op named {pipeline.name!r}, only {list(state.opt_states)}; init(state) joins it."
        )
    return state


def _loss_of_trained(
    settings: _Settings,
    params: Any,
    selected: list[bool],
    model_state: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[[Any], tuple[jax.Array, tuple[Any, Any]]]:
    """The loss as a function of the trained parameters, to `(loss, (model_state, aux))`."""

    def value(trained: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        states = () if model_state is None else (model_state,)
        given = (merge(trained, params, selected), *states, *args)
        try:
            result = settings.loss(*given, **kwargs)
        except Exception as error:
            error.add_note(f"loss: {describe(settings.loss)} was called with {_brief(given)[:800]}")
            raise
        loss, returned, aux = _take_apart(settings, result, model_state)
        _check_loss(settings, loss)
        if model_state is None or settings.update_ops is not None:
            return loss, (model_state, aux)
        return loss, (keep_types("loss", returned, model_state), aux)

    return value


def _take_apart(settings: _Settings, result: Any, model_state: Any) -> tuple[Any, Any, Any]:
    """The loss, the model state and the aux of what the loss function returned."""
    is_pair = isinstance(result, tuple) and len(result) == 2
    if model_state is None:
        if not settings.has_aux:
            return result, None, None
        if is_pair:
            return result[0], None, result[1]
        wanted = "(scalar, aux)"
    elif not settings.has_aux:
        if is_pair:
            return result[0], result[1], None
        if settings.update_ops is not None:  # then the model state it returns would be dropped
            return result, None, None
        wanted = "(scalar, model_state)"
    else:
        if is_pair and isinstance(result[1], tuple) and len(result[1]) == 2:
            return result[0], *result[1]
        wanted = "(scalar, (model_state, aux))"
    raise ValueError(f"loss: {describe(settings.loss)} returned {_brief(result)}; {wanted} would do.")


def _check_loss(settings: _Settings, loss: Any) -> None:
    """Raises the ValueError that the original raised for what is no scalar."""
    if isinstance(loss, int | float) and not isinstance(loss, bool):
        raise ValueError(
            f"loss: {describe(settings.loss)} returned {loss!r}. No gradients provided for any variable: a Python "
            "number depends on no parameter."
        )
    is_real = hasattr(loss, "dtype") and jnp.issubdtype(loss.dtype, jnp.floating)
    if not is_real or loss.shape != ():
        hint = " Is has_aux=True missing?" if isinstance(loss, tuple) else " Take its mean?" if is_real else ""
        raise ValueError(
            f"loss: {describe(settings.loss)} returned {_brief(loss)}; a real scalar array would do.{hint}"
        )


def _check_axes_of_loss(loss: jax.Array) -> None:
    """Raises a ValueError where the loss, after its mean, differs from device to device."""
    axes = ", ".join(repr(axis) for axis in sorted(varying_axes(loss), key=str))
    if axes:
        raise ValueError(f"axis_name: the loss differs along {axes}; axis_name={axes}, for its mean, would do.")


def _brief(tree: Any) -> str:
    """A tree with the type of each array in its place."""
    return str(jax.tree.map(lambda leaf: jax.typeof(leaf) if hasattr(leaf, "dtype") else leaf, tree))
