"""Ways to lay training over devices, all with the same gradients: the batch is eight equal parts of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optloss

SHAPES = {"w": (16, 24), "deep": {"e": (8, 3, 16), "b": (16,)}, "s": ()}
BATCH = 8
STEPS = 20


class Layout(NamedTuple):
    """How parameters lie on a mesh."""

    mesh: tuple[int, ...]
    specs: dict[str, Any]  # of the parameters


def layout(kind: str, devices: int) -> Layout:
    """The layout of a name on so many devices; a batch lies along "x" but where it is replicated."""
    everywhere = {"w": P(), "deep": {"e": P(), "b": P()}, "s": P()}
    rows = {"w": P("x"), "deep": {"e": P("x"), "b": P("x")}, "s": P()}
    columns = {"w": P(None, "x"), "deep": {"e": P(None, None, "x"), "b": P()}, "s": P()}
    grid = {"w": P("x", "y"), "deep": {"e": P("y", None, "x"), "b": P(("x", "y"))}, "s": P()}
    specs = {"replicated": everywhere, "data": everywhere, "rows": rows, "columns": columns, "grid": grid}[kind]
    grid_shape = (devices // 2, 2) if devices > 1 else (1, 1)
    return Layout(grid_shape if kind == "grid" else (devices,), specs)


def parameters() -> Any:
    """Parameters of some magnitudes, the same everywhere."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda shape: draw.normal(size=shape).astype(np.float32), SHAPES, is_leaf=is_shape)


def gradients(step: int) -> Any:
    """Gradients of a step, of 12 bits: the sum of eight parts is exact in any order."""
    draw = np.random.default_rng(1000 + step)

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        return (draw.integers(-2048, 2048, shape) / 2048 * 2.0 ** draw.integers(-3, 3)).astype(np.float32)

    return jax.tree.map(leaf, SHAPES, is_leaf=is_shape)


def batch(step: int, devices: int = 1) -> Any:
    """Equal parts of the gradients of a step along a first axis; larger where the mean over devices is to come."""
    return jax.tree.map(lambda leaf: np.stack([leaf * (devices / BATCH)] * BATCH), gradients(step))


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


@jax.custom_vjp
def given(params: Any, parts: Any) -> jax.Array:
    """A loss whose gradient is the sum of the parts."""
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(parts))


def _forward(params: Any, parts: Any) -> tuple[jax.Array, Any]:
    return given(params, parts), (params, parts)


def _backward(kept: Any, cotangent: jax.Array) -> tuple[Any, Any]:
    params, parts = kept

    def add_up(leaf: jax.Array, param: jax.Array) -> jax.Array:
        sharding = jax.typeof(param).sharding
        total = jnp.sum(leaf, axis=0)
        if sharding.mesh.explicit_axes:
            total = jax.sharding.reshard(total, sharding)
        return total

    return jax.tree.map(add_up, parts, params), jax.tree.map(jnp.zeros_like, parts)


given.defvjp(_forward, _backward)


def whole_loss(params: Any, parts: Any, specs: Any) -> jax.Array:
    """The loss inside `shard_map`: brings each parameter together from its parts."""

    def gather(leaf: jax.Array, spec: P) -> jax.Array:
        for dimension, axes in enumerate(spec):
            if axes is not None:
                leaf = jax.lax.all_gather(leaf, axes, axis=dimension, tiled=True)
        return leaf

    return given(jax.tree.map(gather, params, specs, is_leaf=lambda node: isinstance(node, P)), parts)


def train_on_mesh(kind: str, devices: int, axis_type: AxisType, settings: dict[str, Any]) -> Any:
    """The state after training by `jit` over sharded arrays."""
    shape, specs = layout(kind, devices)
    mesh = mesh_of(shape, devices, axis_type)
    train = optloss.optimize_loss(given, 0, **settings)
    state = train.init(place(parameters(), specs, mesh), key=0)
    for step in range(STEPS):
        parts = batch(step)
        parts = jax.device_put(parts, NamedSharding(mesh, P())) if kind == "replicated" else place_rows(parts, mesh)
        state, _ = train.update(state, parts)
    return state


def train_in_shard_map(kind: str, devices: int, axis_type: AxisType, settings: dict[str, Any]) -> Any:
    """The state after training inside `shard_map`."""
    shape, specs = layout(kind, devices)
    axes = ("x", "y")[: len(shape)]
    mesh = mesh_of(shape, devices, axis_type)
    train = optloss.optimize_loss(
        lambda params, parts: whole_loss(params, parts, specs), 0, axis_name=axes, param_specs=specs, **settings
    )
    state = train.init(place(parameters(), specs, mesh), key=0)
    update = sharded_update(train.update, state, mesh, P(axes))
    for step in range(STEPS):
        state, _ = update(state, place_rows(batch(step, devices), mesh))
    return state


def sharded_update(
    update: Callable[..., Any], state: Any, mesh: jax.sharding.Mesh, rows: P, check_vma: bool = True
) -> Any:
    """An update inside `shard_map`, with the state's own shardings and a batch cut along `rows`."""
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
    inside = jax.shard_map(update, mesh=mesh, in_specs=(specs, rows), out_specs=(specs, P()), check_vma=check_vma)
    return jax.jit(inside, donate_argnums=0)


def train_by_pmap(devices: int, settings: dict[str, Any]) -> Any:
    """The state of each replica after training by `pmap`."""
    train = optloss.optimize_loss(given, 0, axis_name="x", **settings)
    state = train.init(parameters(), key=0)
    replicas = jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), state)
    update = jax.pmap(train.update, axis_name="x", donate_argnums=0, devices=jax.devices()[:devices])
    for step in range(STEPS):
        parts = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch(step, devices))
        replicas, _ = update(replicas, parts)
    return replicas


def mesh_of(shape: tuple[int, ...], devices: int, axis_type: AxisType) -> jax.sharding.Mesh:
    axes = ("x", "y")[: len(shape)]
    return jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(shape), devices=jax.devices()[:devices])


def place_rows(parts: Any, mesh: jax.sharding.Mesh) -> Any:
    """A batch cut along all axes of a mesh."""
    return jax.device_put(parts, NamedSharding(mesh, P(mesh.axis_names)))


def place(tree: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)
