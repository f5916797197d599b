"""What the compiled step of each layout sends between devices, and what it holds on each."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import mesh_of, place, sharded_update

import optloss

SHAPES = {"w": (1024, 1024), "e": (64, 8, 512), "b": (512,)}
SPECS = {
    "replicated": {"w": P(), "e": P(), "b": P()},
    "rows": {"w": P("x"), "e": P("x"), "b": P("x")},
    "columns": {"w": P(None, "x"), "e": P(None, None, "x"), "b": P("x")},
    "grid": {"w": P("x", "y"), "e": P("y", None, "x"), "b": P(("x", "y"))},
}
SETTINGS: dict[str, Any] = {
    "gradient_noise_scale": 0.1,
    "gradient_multipliers": {"w": 0.5},
    "clip_gradients": 1.0,
    "summaries": ["gradient_norm"],
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def parameters() -> dict[str, np.ndarray]:
    return {name: np.full(shape, 0.1, np.float32) for name, shape in SHAPES.items()}


def mesh_for(kind: str, axis_type: AxisType = AxisType.Auto, devices: int = 8) -> jax.sharding.Mesh:
    return mesh_of((devices // 2, 2) if kind == "grid" else (devices,), devices, axis_type)


def compile_step(kind: str, mesh: jax.sharding.Mesh, optimizer: str = "Adam", **settings: Any) -> Any:
    """A step on gradients that are given, which lie as their parameters do."""
    transformation = optloss.transformation(0, 0.1, optimizer, key=0, **SETTINGS, **settings)
    params = place(parameters(), SPECS[kind], mesh)
    state = transformation.init(params)

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = transformation.update(gradients, state, params)
        return updates, state, optax.apply_updates(params, updates)

    return jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, state, params).compile()


def collectives(compiled: Any) -> tuple[Counter[str], Counter[str]]:
    """Those of a program, and those in branches that are not always taken."""
    always: Counter[str] = Counter()
    rarely: Counter[str] = Counter()
    text = compiled.as_text()
    branches = {
        name for names in re.findall(r"branch_computations={([^}]*)}", text) for name in re.findall(r"[\w.\-]+", names)
    }
    for name, body in computations(text):
        (rarely if name in branches else always).update(
            kind for kind in COLLECTIVES for _ in re.findall(rf" {kind}(?:-start)?\(", body)
        )
    return always, rarely


def computations(text: str) -> Iterator[tuple[str, str]]:
    for block in re.split(r"\n(?=%|ENTRY )", text):
        found = re.match(r"(?:ENTRY )?%([\w.\-]+) ", block)
        if found:
            yield found[1], block


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize(("kind", "count"), [("rows", 1), ("columns", 1), ("grid", 4)])
def test_sharded_parameters_need_an_all_reduce_of_scalars(kind: str, count: int, axis_type: AxisType) -> None:
    """As many again are in the branch for norms beyond float32's squares, which a float64 norm has no need of.

    On a mesh of two axes XLA adds up along one and then along the other, and joins only what has the same groups.
    """
    mesh = mesh_for(kind, axis_type)
    assert collectives(compile_step(kind, mesh)) == ({"all-reduce": count}, {"all-reduce": count})
    compiled = compile_step(kind, mesh, reproducible=True)
    assert collectives(compiled) == ({"all-reduce": count}, {})
    lines = [line.split(" all-reduce(")[0] for line in compiled.as_text().splitlines() if " all-reduce(" in line]
    assert all(set(re.findall(r"[fsu]\d+\[[\d,]*\]", line)) == {"f64[]"} for line in lines)


def test_replicated_parameters_need_no_collective() -> None:
    assert collectives(compile_step("replicated", mesh_for("replicated"))) == ({}, {})


def test_an_optimizer_that_is_looked_at_needs_one_more() -> None:
    """Whether Ftrl's new state is finite is asked on each device, and agreed upon: four trees of three arrays."""
    always, rarely = collectives(compile_step("rows", mesh_for("rows"), "Ftrl"))
    assert always == {"all-reduce": 1}
    assert rarely == {"all-reduce": 2}


@pytest.mark.parametrize("kind", ["replicated", "rows", "grid"])
def test_shard_map_needs_the_same(kind: str) -> None:
    """The gradients' own mean, which takes the loss along, and the scalars of the norm."""
    mesh, specs = mesh_for(kind), SPECS[kind]

    def loss(params: Any, scale: jax.Array) -> Any:
        return jnp.mean(scale) * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    train = optloss.optimize_loss(
        loss, 0, 0.1, "Adam", key=0, **SETTINGS, axis_name=mesh.axis_names, param_specs=specs, reproducible=True
    )
    state = train.init(place(parameters(), specs, mesh))
    update = sharded_update(train.update, state, mesh, P(mesh.axis_names))
    scale = jax.device_put(np.ones(8, np.float32), NamedSharding(mesh, P(mesh.axis_names)))
    always, rarely = collectives(update.lower(state, scale).compile())
    assert always == {"all-reduce": 1 if kind == "replicated" else 2}
    assert rarely == {}


@pytest.mark.parametrize("kind", ["rows", "columns", "grid"])
def test_each_device_holds_its_part_alone(kind: str) -> None:
    """An eighth of one device's arguments, results and temporaries, and no array in the shape of a whole parameter."""
    whole, part = compile_step("rows", mesh_for("rows", devices=1)), compile_step(kind, mesh_for(kind))
    for field in ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes", "alias_size_in_bytes"):
        assert getattr(part.memory_analysis(), field) <= getattr(whole.memory_analysis(), field) / 8 + 16_384, field
    for name in ("w", "e"):
        shape = ",".join(map(str, SHAPES[name]))
        assert f"f32[{shape}]" not in part.as_text()


def test_gradients_of_gathered_parameters_are_reduce_scattered() -> None:
    """FSDP inside `shard_map`: a device gets the sum of its own part, and no other."""
    mesh = mesh_for("rows")
    rows = NamedSharding(mesh, P("x"))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(x @ jax.lax.all_gather(params["w"], "x", axis=0, tiled=True)))

    train = optloss.optimize_loss(
        loss, 0, 0.1, "Adam", clip_gradients=1.0, axis_name="x", param_specs=P("x"), reproducible=True
    )
    state = train.init({"w": jax.device_put(np.ones((1024, 512), np.float32), rows)})
    compiled = sharded_update(train.update, state, mesh, P("x")).lower(
        state, jax.device_put(np.ones((64, 1024), np.float32), rows)
    )
    always, rarely = collectives(compiled.compile())
    assert always == {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}  # these of the loss and of the norm
    assert rarely == {}


def test_jit_sends_a_gradient_once_and_slices_it() -> None:
    """What XLA writes on CPUs in place of a reduce-scatter, with `colocate_gradients_with_ops`."""
    mesh = mesh_for("rows")
    rows = NamedSharding(mesh, P("x"))
    train = optloss.optimize_loss(
        lambda params, x: jnp.mean(jnp.square(x @ params["w"])),
        0,
        0.1,
        "Adam",
        clip_gradients=1.0,
        colocate_gradients_with_ops=True,
        reproducible=True,
    )
    state = train.init({"w": jax.device_put(np.ones((1024, 512), np.float32), rows)})
    text = train.update.lower(state, jax.device_put(np.ones((64, 1024), np.float32), rows)).compile().as_text()
    reduced = [line for line in text.splitlines() if re.search(r" all-reduce\(", line) and "[512,1024]" in line]
    assert len(reduced) == 1
    slices = [line for line in text.splitlines() if " dynamic-slice(" in line and re.search(r"f32\[512,128\]", line)]
    assert slices
