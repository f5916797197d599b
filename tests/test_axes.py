"""Named axes: means, norms, noise and skips inside `shard_map` and `pmap`, and what is said of wrong use."""

import functools
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

SHAPES = {"w": (16, 24), "b": (16,)}
SPECS = {
    "rows": {"w": P("x"), "b": P("x")},
    "columns": {"w": P(None, "x"), "b": P()},
    "grid": {"w": P("x", "y"), "b": P(("y", "x"))},
}


def mesh_for(kind: str) -> jax.sharding.Mesh:
    return mesh_of((4, 2) if kind == "grid" else (8,), 8, AxisType.Auto)


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def update_in_parts(stage: Any, kind: str, tree: Any, **shard_map: Any) -> Any:
    """What a stage makes of a tree whose leaves are cut over eight devices."""

    def update(tree: Any) -> Any:
        return stage.update(tree, stage.init(tree))[0]

    specs = SPECS[kind]
    inside = jax.shard_map(update, mesh=mesh_for(kind), in_specs=(specs,), out_specs=specs, **shard_map)
    return jax.tree.map(np.asarray, jax.jit(inside)(tree))


# ---- stages alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("generator", ["mixer", pytest.param("threefry", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SPECS)
def test_each_part_has_its_block_of_the_whole_array_s_noise(kind: str, generator: str, checks: bool) -> None:
    stage = optloss.add_gradient_noise(1.0, 7, generator=generator)
    in_parts = optloss.add_gradient_noise(1.0, 7, generator=generator, param_specs=SPECS[kind])
    nothing = jax.tree.map(np.zeros_like, draw(0))
    whole = jax.jit(lambda tree: stage.update(tree, stage.init(tree))[0])(nothing)
    got = update_in_parts(in_parts, kind, nothing, check_vma=checks)
    for name in SHAPES:
        assert len(np.unique(got[name])) == got[name].size
        np.testing.assert_array_equal(got[name], whole[name])


@pytest.mark.parametrize("kind", SPECS)
def test_a_clip_sees_the_norm_of_the_whole_arrays(kind: str) -> None:
    tree = draw(1)
    clipped = update_in_parts(optloss.clip_by_global_norm(1.0), kind, tree)
    norm = np.sqrt(sum(np.sum(np.square(leaf.astype(np.float64))) for leaf in tree.values()))
    for name, leaf in tree.items():
        np.testing.assert_allclose(clipped[name], leaf / norm, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_the_norm_of_parts_is_right_at_any_magnitude(magnitude: float) -> None:
    def norm(x: jax.Array) -> jax.Array:
        return optloss.global_norm({"x": x})

    x = np.full(64, magnitude / 8, np.float32)
    got = jax.jit(jax.shard_map(norm, mesh=mesh_for("rows"), in_specs=P("x"), out_specs=P()))(x)
    np.testing.assert_allclose(got, magnitude, rtol=1e-6)


def test_noise_on_a_leaf_that_is_cut_wants_its_spec() -> None:
    stage = optloss.add_gradient_noise(1.0, 7)
    with pytest.raises(ValueError, match=r"param_specs: 'b' differs along 'x', its PartitionSpec names no axis; the"):
        update_in_parts(stage, "rows", draw(0))


# ---- the whole step --------------------------------------------------------------------------------------------------


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]).sum(axis=-1) + jnp.sum(params["b"]) - 1.0))


def gathering(specs: Any) -> Any:
    """The loss of parameters that are brought together from their parts."""

    def gathered(params: Any, x: jax.Array) -> jax.Array:
        whole = {}
        for name, leaf in params.items():
            for dimension, axes in enumerate(specs[name]):
                if axes is not None:
                    leaf = jax.lax.all_gather(leaf, axes, axis=dimension, tiled=True)
            whole[name] = leaf
        return loss(whole, x)

    return gathered


BATCHES = np.random.default_rng(5).normal(size=(4, 16, 16)).astype(np.float32)
SETTINGS: dict[str, Any] = {"gradient_noise_scale": 0.01, "clip_gradients": 0.5, "summaries": ["gradient_norm"]}


@functools.cache
def train_whole(optimizer: str, specs: Any = None) -> Any:
    train = optloss.optimize_loss(loss, 0, 0.01, optimizer, **SETTINGS, param_specs=specs)
    state = train.init(draw(2), key=0)
    for x in BATCHES:
        state, out = train.update(state, x)
    return state, out


@pytest.mark.slow
@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("optimizer", ["Adam", "Momentum"])
@pytest.mark.parametrize("kind", ["replicated", *SPECS])
def test_shard_map_takes_the_step_of_the_whole_batch(kind: str, optimizer: str, checks: bool) -> None:
    """Gradients, loss and norms are those of one device: means over the axes, not sums, whatever types can tell."""
    mesh = mesh_for(kind)
    specs = SPECS.get(kind, {"w": P(), "b": P()})
    train = optloss.optimize_loss(
        gathering(specs), 0, 0.01, optimizer, **SETTINGS, axis_name=mesh.axis_names, param_specs=specs
    )
    state = train.init(place(draw(2), specs, mesh), key=0)
    update = sharded_update(train.update, state, mesh, P(mesh.axis_names), check_vma=checks)
    for x in BATCHES:
        state, out = update(state, x)
    expected, expected_out = train_whole(optimizer)
    assert distance(state.params, expected.params) < 1e-6
    for a, b in zip(jax.tree.leaves((state, out)), jax.tree.leaves((expected, expected_out)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # 16 rows are added up in another order


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["replicated", *SPECS])
def test_jit_on_a_mesh_ends_within_a_millionth_of_one_device(kind: str, axis_type: AxisType) -> None:
    """Gradients are computed where the arrays lie, and so added up in another order."""
    mesh = mesh_of((4, 2) if kind == "grid" else (8,), 8, axis_type)
    rows = NamedSharding(mesh, P(mesh.axis_names))

    def laid_out(params: Any, x: jax.Array) -> jax.Array:
        if axis_type == AxisType.Explicit:  # which leaves it to the user to bring parameters together
            params = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, NamedSharding(mesh, P())), params)
        return loss(params, x)

    train = optloss.optimize_loss(laid_out, 0, 0.01, "Adam", **SETTINGS)
    state = train.init(place(draw(2), SPECS.get(kind, {"w": P(), "b": P()}), mesh), key=0)
    for x in BATCHES:
        state, _ = train.update(state, jax.device_put(x, rows))
    assert distance(state.params, train_whole("Adam")[0].params) < 1e-6


def distance(tree: Any, other: Any) -> float:
    """The norm of the difference of two trees over the norm of the second."""
    flat, flat_other = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(t)]) for t in (tree, other)
    )
    return float(np.linalg.norm(flat - flat_other) / np.linalg.norm(flat_other))


@pytest.mark.slow
def test_a_model_axis_is_left_to_the_loss() -> None:
    """Tensor parallel: the mean is over "data" alone, the norm over both axes."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {"w": P(None, "model"), "b": P("model")}

    def parallel(params: Any, x: jax.Array) -> jax.Array:
        sums = jnp.tanh(x @ params["w"]).sum(axis=-1) + jnp.sum(params["b"])
        return jnp.mean(jnp.square(jax.lax.psum(sums, "model") - 1.0))

    train = optloss.optimize_loss(parallel, 0, 0.01, "SGD", **SETTINGS, axis_name="data", param_specs=specs)
    state = train.init(place(draw(2), specs, mesh), key=0)
    update = sharded_update(train.update, state, mesh, P("data"))
    for x in BATCHES:
        state, out = update(state, x)
    expected, expected_out = train_whole("SGD")
    for a, b in zip(jax.tree.leaves((state, out)), jax.tree.leaves((expected, expected_out)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("optimizer", ["Adam", "Ftrl"])
def test_a_bad_number_on_one_device_is_skipped_on_all(optimizer: str) -> None:
    mesh, specs = mesh_for("rows"), SPECS["rows"]
    train = optloss.optimize_loss(
        gathering(specs), 0, 0.01, optimizer, **SETTINGS, axis_name="x", param_specs=specs, has_aux=False
    )
    state = train.init(place(draw(2), specs, mesh), key=0)
    before = jax.tree.map(np.asarray, state)
    update = sharded_update(train.update, state, mesh, P("x"))
    x = BATCHES[0].copy()
    x[5] = np.nan
    after, _ = update(state, x)
    assert int(after.opt_states["OptimizeLoss"].nonfinite_steps) == 1
    np.testing.assert_array_equal([shard.data for shard in after.global_step.addressable_shards], [0] * 8)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        if a.dtype == np.float32:
            assert np.asarray(a).tobytes() == b.tobytes()


def test_replicas_of_pmap_stay_equal_when_one_has_a_bad_batch() -> None:
    train = optloss.optimize_loss(loss, 0, 0.01, "Adam", **SETTINGS, axis_name="x")
    state = train.init(draw(2), key=0)
    replicas = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), state)
    update = jax.pmap(train.update, axis_name="x")
    for step, x in enumerate(BATCHES):
        x = x.reshape(8, 2, 16).copy()
        x[3, 1, 5] = np.inf if step == 1 else x[3, 1, 5]
        replicas, _ = update(replicas, x)
    np.testing.assert_array_equal(replicas.opt_states["OptimizeLoss"].nonfinite_steps, [1] * 8)
    np.testing.assert_array_equal(replicas.global_step, [len(BATCHES) - 1] * 8)
    for leaf in jax.tree.leaves(replicas):
        assert {np.asarray(leaf[device]).tobytes() for device in range(8)} == {np.asarray(leaf[0]).tobytes()}


def test_an_overflow_in_one_device_s_slot_is_skipped_on_all() -> None:
    """Ftrl is looked at after its step: here the square of one gradient, of a row that one device has alone."""
    mesh = mesh_for("rows")
    transformation = optloss.transformation(0, 0.1, "Ftrl", param_specs=P("x"))
    params = {"w": jax.device_put(np.ones(8, np.float32), NamedSharding(mesh, P("x")))}
    state = transformation.init(params)
    specs = jax.tree.map(lambda leaf: P("x") if leaf.shape == (8,) else P(), state)
    inside = jax.shard_map(
        transformation.update, mesh=mesh, in_specs=(P("x"), specs, P("x")), out_specs=(P("x"), specs)
    )
    gradients = {"w": np.array([1, 1, 1, 1, 1, 1, 1, 1e30], np.float32)}
    updates, state = jax.jit(inside)(gradients, state, params)
    np.testing.assert_array_equal(updates["w"], np.zeros(8))
    assert int(state.opt_state.nonfinite_steps) == 1


@pytest.mark.slow
def test_histograms_of_parts_are_those_of_the_whole() -> None:
    mesh, tree = mesh_for("grid"), draw(3)
    specs = SPECS["grid"]
    transformation = optloss.transformation(0, 0.1, "SGD", summaries=["gradients"], param_specs=specs)

    def summaries(tree: Any) -> Any:
        return transformation.update(tree, transformation.init(tree), tree)[1].summaries

    expected = jax.jit(summaries)(tree)
    got = jax.jit(jax.shard_map(summaries, mesh=mesh, in_specs=(specs,), out_specs=P()))(tree)
    assert {int(h.num) for h in got.values()} == {16, 16 * 24}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)  # sums of both signs, in another order


# ---- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"param_specs": SPECS["rows"]}, r"axis_name: the loss differs along 'x'; axis_name='x', for its mean, would"),
        ({"axis_name": "x", "param_specs": P()}, r"param_specs: 'b' differs along 'x', its PartitionSpec names no axi"),
        ({"axis_name": "x", "param_specs": SPECS["columns"]}, r"param_specs: 'b' differs along 'x', its PartitionSpe"),
        ({"axis_name": "x", "param_specs": {"w": P("x")}}, r"param_specs: no prefix of the parameters' tree"),
        ({"axis_name": "x"}, r"param_specs: 'b' differs along 'x', its PartitionSpec names no axis"),
    ],
)
def test_a_wrong_layout_is_an_error(settings: dict[str, Any], match: str) -> None:
    mesh, specs = mesh_for("rows"), SPECS["rows"]
    train = optloss.optimize_loss(gathering(specs), 0, 0.01, "Adam", **SETTINGS, **settings)
    state = train.init(place(draw(2), specs, mesh), key=0)
    update = sharded_update(train.update, state, mesh, P("x"))
    with pytest.raises(ValueError, match=match):
        update(state, BATCHES[0])


def test_a_gradient_that_was_not_averaged_is_an_error() -> None:
    transformation = optloss.transformation(0, 0.1, "SGD")

    def step(gradient: jax.Array, param: jax.Array) -> Any:
        params = {"w": param}
        return transformation.update({"w": gradient}, transformation.init(params), params)[0]

    inside = jax.shard_map(step, mesh=mesh_for("rows"), in_specs=(P("x"), P()), out_specs=P("x"))
    with pytest.raises(ValueError, match=r"updates: the gradient of 'w' differs along 'x', its parameter does not"):
        jax.jit(inside)(np.ones(8, np.float32), np.ones(1, np.float32))


def test_a_clip_that_sees_its_part_alone_is_an_error() -> None:
    """Optax's clip takes the norm of what each device has; where that reaches whole parameters, it shows."""
    specs = {"w": P("x"), "b": P()}
    transformation = optloss.transformation(
        0, 0.1, "SGD", clip_gradients=optax.clip_by_global_norm(1.0), param_specs=specs
    )

    def step(params: Any) -> Any:
        return transformation.update(params, transformation.init(params), params)[0]

    inside = jax.shard_map(step, mesh=mesh_for("rows"), in_specs=(specs,), out_specs=specs)
    with pytest.raises(ValueError, match=r"clip_gradients: the clipped gradient of 'b' differs along 'x'"):
        jax.jit(inside)(draw(0))


@pytest.mark.parametrize("specs", ["x", {"w": "x"}, {"w": ("x",)}, 3])
def test_specs_that_are_none_are_an_error(specs: Any) -> None:
    with pytest.raises(TypeError, match=r"param_specs: got .* a tree of PartitionSpecs, as `shard_map` takes"):
        optloss.transformation(0, 0.1, "SGD", param_specs=specs)
    with pytest.raises(TypeError, match=r"param_specs: got"):
        optloss.add_gradient_noise(0.1, 0, param_specs=specs)


@pytest.mark.slow
def test_outside_of_shard_map_specs_say_nothing() -> None:
    """There arrays are whole: the step is the one without specs."""
    with_specs = train_whole("SGD", P("x"))
    for a, b in zip(jax.tree.leaves(with_specs), jax.tree.leaves(train_whole("SGD")), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- where the state lies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("kind", SPECS)
def test_every_array_stays_where_init_put_it(kind: str, axis_type: AxisType) -> None:
    """Slots lie as their parameters do, counters and the clip's statistics on all devices, before and after a step."""
    mesh = mesh_of((4, 2) if kind == "grid" else (8,), 8, axis_type)
    clip = optloss.adaptive_clipping_fn(global_step=True, report_summary=True)
    train = optloss.optimize_loss(
        lambda params: sum(jnp.sum(jnp.square(leaf)) for leaf in params.values()),
        0,
        0.1,
        "Adam",
        **{**SETTINGS, "clip_gradients": clip},
    )
    state = train.init(place(draw(2), SPECS[kind], mesh), key=0)
    for _ in range(2):
        opt_state = state.opt_states["OptimizeLoss"]
        for name, spec in SPECS[kind].items():
            wanted = NamedSharding(mesh, spec)
            for leaf in (state.params[name], opt_state.optimizer.m[name], opt_state.optimizer.v[name]):
                assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name
        scalars = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0 or leaf.dtype == np.uint32]
        assert len(scalars) > 8
        assert all(leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8 for leaf in scalars)
        state, _ = train.update(state)


@pytest.mark.slow
def test_slots_can_be_cut_where_parameters_are_not() -> None:
    """ZeRO-1, by `jit`'s own `out_shardings`; it has the numbers of the step with whole slots."""
    mesh = mesh_for("rows")
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))
    train = optloss.optimize_loss(loss, 0, 0.01, "Adam", **SETTINGS)
    state = train.init(jax.device_put(draw(2), everywhere), key=0)
    is_slot = {id(leaf) for slots in state.opt_states["OptimizeLoss"].optimizer[:2] for leaf in jax.tree.leaves(slots)}
    shardings = jax.tree.map(lambda leaf: rows if id(leaf) in is_slot else everywhere, state)
    state = jax.device_put(state, shardings)
    update = jax.jit(train.update, donate_argnums=0, out_shardings=(shardings, everywhere))
    for x in BATCHES:
        state, _ = update(state, jax.device_put(x, rows))
    m = state.opt_states["OptimizeLoss"].optimizer.m["w"]
    assert m.addressable_shards[0].data.shape == (2, 24)
    assert state.params["w"].sharding.is_fully_replicated
    expected, _ = train_whole("Adam")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # 16 rows are added up in another order
