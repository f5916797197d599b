"""The state of training, and how `init` makes its arrays the op's own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optloss._check import shown
from optloss._pipeline import OptState
from optloss._trees import strong_array

__all__ = ["TrainState", "own", "spread_over_mesh", "unshared"]


class TrainState(NamedTuple):
    """What training carries from step to step: arrays alone, of unchanging shape and dtype."""

    global_step: jax.Array | None  # shape=(), an integer; None without a counter
    params: Any  # the user's tree
    model_state: Any  # the user's tree of what `update_ops` change; None without one
    opt_states: dict[str, OptState]  # one for the name of each train op


def own(argument: str, tree: Any) -> Any:
    """Copies of the arrays of a tree: the update donates its state, and what the user holds must stay alive."""

    def copy(leaf: Any) -> jax.Array:
        reason: Exception | None = None
        array: Any
        try:
            array = strong_array(jnp.array(leaf, copy=True))
        except Exception as error:  # of what a leaf can be, each fails in its own way
            array, reason = None, error
        if not isinstance(array, jax.Array):  # float0 comes back as something else
            raise TypeError(
                f"{argument}: got {shown(leaf)} of type {type(leaf).__name__} among the leaves; arrays and numbers "
                "would do."
            ) from reason
        return array

    return jax.tree.map(copy, tree)


def unshared(tree: Any, state: TrainState) -> Any:
    """The tree with a copy for each array that stands in it, or in the state, before: none can be donated twice."""
    seen = {id(leaf) for leaf in jax.tree.leaves(state)}

    def once(leaf: jax.Array) -> jax.Array:
        if id(leaf) in seen:
            leaf = jnp.array(leaf, copy=True)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(once, tree)


def spread_over_mesh(state: TrainState) -> TrainState:
    """The state with what lies on one device spread over the mesh of the others, where an update would leave it."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if not isinstance(leaf, jax.core.Tracer)]
    meshes = {leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, jax.sharding.NamedSharding)}
    if len(meshes) != 1:
        return state
    everywhere = jax.sharding.NamedSharding(meshes.pop(), jax.sharding.PartitionSpec())

    def spread(leaf: jax.Array) -> jax.Array:
        is_single = not isinstance(leaf, jax.core.Tracer) and isinstance(
            leaf.sharding, jax.sharding.SingleDeviceSharding
        )
        return jax.device_put(leaf, everywhere) if is_single else leaf

    return TrainState(*jax.tree.map(spread, tuple(state)))
