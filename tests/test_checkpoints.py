"""A state that went through a checkpoint is the state that was saved, to the bit, and so is the run that goes on."""

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import optloss

# ---- the ways to save ------------------------------------------------------------------------------------------------


class Saver(NamedTuple):
    """A way to save a state in a folder, and to restore it there with what makes a fresh one."""

    save: Callable[[Path, Any], None]
    restore: Callable[[Path, Callable[[], Any]], Any]


def save_orbax(folder: Path, state: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)


def restore_orbax(folder: Path, init: Callable[[], Any]) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", jax.eval_shape(init))


def save_orbax_manager(folder: Path, state: Any) -> None:
    with ocp.CheckpointManager(folder) as manager:
        manager.save(5, args=ocp.args.StandardSave(state))


def restore_orbax_manager(folder: Path, init: Callable[[], Any]) -> Any:
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(jax.eval_shape(init)))


def save_msgpack(folder: Path, state: Any) -> None:
    (folder / "state.msgpack").write_bytes(flax.serialization.to_bytes(state))


def restore_msgpack(folder: Path, init: Callable[[], Any]) -> Any:
    return flax.serialization.from_bytes(init(), (folder / "state.msgpack").read_bytes())


def save_equinox(folder: Path, state: Any) -> None:
    eqx.tree_serialise_leaves(folder / "state.eqx", state)


def restore_equinox(folder: Path, init: Callable[[], Any]) -> Any:
    return eqx.tree_deserialise_leaves(folder / "state.eqx", like=jax.eval_shape(init))


def save_pickle(folder: Path, state: Any) -> None:
    (folder / "state.pickle").write_bytes(pickle.dumps(state))


def restore_pickle(folder: Path, init: Callable[[], Any]) -> Any:
    del init
    return pickle.loads((folder / "state.pickle").read_bytes())


def save_npz(folder: Path, state: Any) -> None:
    np.savez(folder / "state.npz", *jax.tree.leaves(state))


def restore_npz(folder: Path, init: Callable[[], Any]) -> Any:
    """NumPy has no bfloat16: it keeps the bits, as a dtype of two void bytes, and the view names it again."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(init))
    with np.load(folder / "state.npz") as file:
        arrays = [file[f"arr_{i}"] for i in range(len(leaves))]
    named = [a.view(leaf.dtype) if a.dtype.kind == "V" else a for a, leaf in zip(arrays, leaves, strict=True)]
    return jax.tree.unflatten(treedef, named)


SAVERS = {
    "Orbax": Saver(save_orbax, restore_orbax),
    "Orbax's manager": Saver(save_orbax_manager, restore_orbax_manager),
    "msgpack": Saver(save_msgpack, restore_msgpack),
    "Equinox": Saver(save_equinox, restore_equinox),
    "pickle": Saver(save_pickle, restore_pickle),
    "npz": Saver(save_npz, restore_npz),
}
over_savers = pytest.mark.parametrize("saver", SAVERS.values(), ids=SAVERS)

# ---- the states ------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """One or more train ops, whose states go together."""

    init: Callable[[int], optloss.TrainState]  # of a seed, for the parameters and the noise
    update: Callable[[optloss.TrainState, jax.Array], optloss.TrainState]


SETTINGS = {
    "gradient_noise_scale": 0.01,
    "gradient_multipliers": {"dense/bias": 0.5},
    "clip_gradients": optloss.adaptive_clipping_fn(global_step=True, report_summary=True),
    "learning_rate_decay_fn": lambda rate, step: optloss.exponential_decay(rate, step, 10, 0.5),
}


def initial_params(seed: int, dtype: Any = jnp.float32) -> dict[str, dict[str, jax.Array]]:
    kernel, bias = jax.random.normal(jax.random.key(seed), (16, 2), dtype), jnp.full(2, seed, dtype)
    return {"dense": {"kernel": kernel, "bias": bias}}


def loss(params: Any, mean: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A quadratic of the parameters; the model state is a moving average of the batches."""
    outputs = x @ params["dense"]["kernel"] + params["dense"]["bias"]
    return jnp.mean(jnp.square(outputs - 1.0)), 0.9 * mean + 0.1 * jnp.mean(x)


def one_op(optimizer: str, rate: float, dtype: Any = jnp.float32) -> Training:
    train = optloss.optimize_loss(loss, 0, rate, optimizer, **SETTINGS)
    return Training(
        lambda seed: train.init(initial_params(seed, dtype), key=seed, model_state=jnp.float32(seed)),
        lambda state, x: train.update(state, x)[0],
    )


def two_ops(rate: float) -> Training:
    """Of one step, with slashes in their names, as TF1's scopes had."""
    kernel_op = optloss.optimize_loss(
        loss, 0, rate, "Adam", **SETTINGS, variables=["dense/kernel"], name="two/kernel", increment_global_step=False
    )
    bias_op = optloss.optimize_loss(loss, 0, rate, "RMSProp", **SETTINGS, variables=["dense/bias"], name="two/bias")

    def init(seed: int) -> optloss.TrainState:
        state = kernel_op.init(initial_params(seed), key=seed, model_state=jnp.float32(seed))
        return bias_op.init(state, key=seed)

    return Training(init, lambda state, x: bias_op.update(kernel_op.update(state, x)[0], x)[0])


# Of the rate. An op that goes on is built with another rate than the one that was saved, since the state has it.
TRAININGS: dict[str, Callable[[float], Training]] = {
    "Adam": functools.partial(one_op, "Adam"),
    "Ftrl": functools.partial(one_op, "Ftrl"),
    "Momentum in bfloat16": functools.partial(one_op, "Momentum", dtype=jnp.bfloat16),
    "Optax's adamw": functools.partial(one_op, "adamw"),
    "two ops": two_ops,
}
over_trainings = pytest.mark.parametrize("build", TRAININGS.values(), ids=TRAININGS)
# For a test that compiles in each case: no case takes long, but the whole table does.
slow_but_adam = [pytest.param(TRAININGS[k], id=k, marks=[pytest.mark.slow] * (k != "Adam")) for k in TRAININGS]


def batch(step: int) -> jax.Array:
    """A function of the step alone, so that a run can go on anywhere; the one of step 3 is not finite."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 16))
    return x * jnp.nan if step == 3 else x


def go_on(update: Callable[[Any, jax.Array], Any], state: Any, steps: range) -> Any:
    return functools.reduce(lambda state, step: update(state, batch(step)), steps, state)


def copy(state: Any) -> Any:
    """Copies, since an update donates what it is given."""
    return jax.tree.map(jnp.copy, state)


@functools.cache
def uninterrupted(build: Callable[[float], Training]) -> tuple[optloss.TrainState, optloss.TrainState]:
    """The states after 5 and after 10 steps of one run."""
    training = build(0.1)
    middle = go_on(training.update, training.init(1), range(5))
    return copy(middle), go_on(training.update, middle, range(5, 10))


def assert_same_bits(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        assert jax.typeof(a).weak_type == jax.typeof(b).weak_type, where
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where


# ---- the tests -------------------------------------------------------------------------------------------------------


@over_trainings
def test_a_saved_state_differs_from_a_fresh_one_in_every_leaf(build: Any) -> None:
    """Without that, the tests below could not tell a restored leaf from one that is not; one step in 5 was skipped."""
    saved, fresh = uninterrupted(build)[0], build(0.5).init(2)
    assert int(saved.global_step) == 4
    assert [int(state.nonfinite_steps) for state in saved.opt_states.values()] == [1] * len(saved.opt_states)
    for (path, a), b in zip(jax.tree.leaves_with_path(saved), jax.tree.leaves(fresh), strict=True):
        assert np.asarray(a).tobytes() != np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@over_savers
@over_trainings
def test_a_restored_state_has_the_tree_types_and_bits_of_the_saved_one(
    build: Any, saver: Saver, tmp_path: Path
) -> None:
    saved, _ = uninterrupted(build)
    saver.save(tmp_path, saved)
    assert_same_bits(saver.restore(tmp_path, lambda: build(0.5).init(2)), saved)


@over_savers
@pytest.mark.parametrize("build", slow_but_adam)
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_uninterrupted_one(
    build: Any, saver: Saver, tmp_path: Path
) -> None:
    saved, end = uninterrupted(build)
    saver.save(tmp_path, saved)
    training = build(0.5)
    restored = saver.restore(tmp_path, lambda: training.init(2))
    assert_same_bits(go_on(training.update, restored, range(5, 10)), end)


def test_steps_that_donate_a_state_while_it_is_being_saved_leave_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    """The manager writes in the background."""
    build = TRAININGS["Adam"]
    training, (saved, _) = build(0.1), uninterrupted(build)
    with ocp.CheckpointManager(tmp_path) as manager:
        state = copy(saved)
        manager.save(5, args=ocp.args.StandardSave(state))
        go_on(training.update, state, range(5, 10))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert_same_bits(restore_orbax_manager(tmp_path, lambda: training.init(2)), saved)


def sharded_training(rate: float) -> Training:
    """The rows of the kernel, and so of its slots, lie over eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    train = optloss.optimize_loss(loss, 0, rate, "Adam", **SETTINGS)

    def init(seed: int) -> optloss.TrainState:
        params = jax.device_put(initial_params(seed), {"dense": {"kernel": rows, "bias": whole}})
        return train.init(params, key=seed, model_state=jnp.float32(seed))

    return Training(init, lambda state, x: train.update(state, jax.device_put(x, rows))[0])


# What Orbax takes for a target: a fresh state, its types with shardings, or without, which the checkpoint then gives.
TARGETS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "a fresh state": lambda init: init(),
    "types with shardings": lambda init: jax.tree.map(ocp.utils.to_shape_dtype_struct, init()),
    "types alone": jax.eval_shape,
}


@pytest.mark.slow
@pytest.mark.parametrize("target_of", TARGETS.values(), ids=TARGETS)
def test_a_sharded_state_comes_back_from_orbax_with_its_shardings_and_goes_on(target_of: Any, tmp_path: Path) -> None:
    saved, end = uninterrupted(sharded_training)
    save_orbax(tmp_path, saved)
    training = sharded_training(0.5)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", target_of(lambda: training.init(2)))
    assert restored.opt_states["OptimizeLoss"].optimizer.m["dense"]["kernel"].sharding.spec == PartitionSpec("x")
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, saved)
    assert_same_bits(restored, saved)
    assert_same_bits(go_on(training.update, restored, range(5, 10)), end)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["msgpack", "Orbax"])
def test_a_flax_train_state_with_the_transformation_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Its summaries, whose tags have slashes, are in the state too."""

    def build(rate: float, seed: int) -> Callable[[], TrainState]:
        tx = optloss.optimize_loss(loss, 0, rate, "Adam", **SETTINGS, key=seed).transformation
        return lambda: TrainState.create(apply_fn=loss, params=initial_params(seed), tx=tx)

    @jax.jit
    def update(state: Any, x: jax.Array) -> Any:
        gradients = jax.grad(lambda params: state.apply_fn(params, 0.0, x)[0])(state.params)
        return state.apply_gradients(grads=gradients)

    saved = go_on(update, build(0.1, 1)(), range(5))
    end = go_on(update, saved, range(5, 10))
    SAVERS[name].save(tmp_path, saved)
    restored = SAVERS[name].restore(tmp_path, build(0.5, 2))
    assert isinstance(restored.opt_state, optloss.TransformationState)
    assert_same_bits((restored.params, restored.opt_state), (saved.params, saved.opt_state))
    resumed = go_on(update, restored, range(5, 10))
    assert int(resumed.opt_state.global_step) == 9
    assert_same_bits((resumed.params, resumed.opt_state), (end.params, end.opt_state))
