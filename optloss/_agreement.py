"""What has to agree: a state with the op that it is given to, and the processes of a run with each other."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optloss._axes import is_inside_shard_map
from optloss._fingerprint import fact
from optloss._names import check_like
from optloss._pipeline import OptState, Pipeline, dry_run, init_stages
from optloss._processes import check_processes_agree, digest, facts_of_arrays, versions

__all__ = ["check_agreement", "check_state"]


def check_state(pipeline: Pipeline, state: OptState, params: optax.Params) -> None:
    """Raises a ValueError where a state was made for other parameters or settings."""
    if not isinstance(state, OptState):
        raise TypeError(f"state: got {type(state).__name__} for an OptState; what init or update gave would do.")
    if is_inside_shard_map():  # where parameters are parts, and an array among the settings is whole
        return
    key = 0 if pipeline.key is None else pipeline.key
    wanted = jax.eval_shape(lambda params: init_stages(pipeline, params, key), params)
    for stage in ("noise", "multipliers", "clip", "optimizer"):
        have, new = getattr(state, stage), getattr(wanted, stage)
        if isinstance(new, tuple) and type(have) is not type(new):
            raise ValueError(
                f"state: its {stage} is {type(have).__name__}, that of this op {type(new).__name__}; the state of an "
                "op with these settings would do."
            )
        check_like(f"state: {stage},", have, new)


def check_agreement(
    pipeline: Pipeline,
    params: optax.Params,
    state: OptState,
    global_step: jax.Array | None,
    key: ArrayLike | None,
    model_state: Any = None,
) -> None:
    """Raises a ValueError where processes are about to train something else each: see `_processes`."""
    arrays = (params, state, global_step, model_state)
    if jax.process_count() == 1 or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays)):
        return
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, state, global_step))
    zero = jax.ShapeDtypeStruct((), jnp.float32)
    program = jax.jit(lambda params, state, step, loss: tuple(dry_run(pipeline, params, state, step, loss)))
    check_processes_agree(
        {
            "versions": versions(),
            **{argument: fact(value) for argument, value in pipeline.settings.items()},
            "key of init": fact(key),
            **facts_of_arrays("params", params),
            **facts_of_arrays("model_state", model_state),
            "what functions among the settings do": digest(program.lower(*shapes, zero).as_text().encode()),
        }
    )
