"""Restoring: what a checkpoint gave is put into a new state, and what differs is told; a flipped bit is noticed."""

import functools
import pickle
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import optloss

PARAMS = {"hidden": {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}
SETTINGS = {
    "learning_rate": 0.1,
    "optimizer": "Adam",
    "gradient_noise_scale": 0.01,
    "gradient_multipliers": {"hidden/bias": 0.5},
    "clip_gradients": optloss.adaptive_clipping_fn(global_step=True),
    "learning_rate_decay_fn": lambda rate, step: optloss.exponential_decay(rate, step, 100, 0.96),
}


def loss(params: Any, x: Any) -> jax.Array:
    return sum(jnp.sum((leaf - x) ** 2) for leaf in jax.tree.leaves(params))


def build(**settings: Any) -> optloss.TrainOp:
    return optloss.optimize_loss(loss, 0, **{**SETTINGS, **settings})


@functools.cache
def trained_by_default(steps: int) -> optloss.TrainState:
    return trained(steps, {**PARAMS})


def trained(steps: int = 3, params: Any = PARAMS, **settings: Any) -> optloss.TrainState:
    if params is PARAMS and not settings:
        return trained_by_default(steps)
    train = build(**settings)
    state = train.init(params, key=0)
    for step in range(steps):
        state, _ = train.update(state, float(step))
    return state


def fresh(params: Any = PARAMS, **settings: Any) -> optloss.TrainState:
    return build(**settings).init(params, key=1)


def containers_lost(node: Any) -> Any:
    """A tree as Orbax gives it without a target: dicts and lists of NumPy arrays."""
    if isinstance(node, tuple) and hasattr(node, "_asdict"):
        return {name: containers_lost(part) for name, part in node._asdict().items()} or None
    if isinstance(node, dict):
        return {name: containers_lost(part) for name, part in node.items()}
    if isinstance(node, list | tuple):
        return [containers_lost(part) for part in node]
    return None if node is None else np.asarray(node)


def by_msgpack(state: Any) -> Any:
    return flax.serialization.msgpack_restore(
        flax.serialization.msgpack_serialize(flax.serialization.to_state_dict(state))
    )


def restored(saved: Any, state: Any) -> tuple[Any, list[str]]:
    """What came back, and the lines of the warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = optloss.restore(state, saved)
    assert all(each.category is UserWarning and each.filename == __file__ for each in caught)
    return result, [line.strip() for each in caught for line in str(each.message).splitlines()[1:]]


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


# ---- equal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda state: state, jax.device_get, containers_lost, by_msgpack])
def test_what_was_saved_comes_back_to_the_bit_from_any_container(form: Callable[[Any], Any]) -> None:
    saved = trained()
    result, told = restored(form(saved), fresh())
    assert told == []
    assert_same_bits(result, saved)
    build().update(result, 1.0)  # which donates what came back, and not what was saved
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(saved))


def test_a_run_that_goes_on_ends_as_the_uninterrupted_one() -> None:
    train, half = build(), containers_lost(trained(3))
    state = optloss.restore(fresh(), half)
    for step in range(3, 6):
        state, _ = train.update(state, float(step))
    assert_same_bits(state, trained(6))


def test_what_comes_back_lies_as_the_new_state_does() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec(None, "x"))
    params = {"hidden": {**PARAMS["hidden"], "kernel": jax.device_put(PARAMS["hidden"]["kernel"], rows)}}
    result, _ = restored(containers_lost(trained()), fresh(params))
    slots = result.opt_states["OptimizeLoss"].optimizer
    assert slots.m["hidden"]["kernel"].sharding == result.params["hidden"]["kernel"].sharding == rows


def test_the_state_of_a_transformation_comes_back_inside_a_flax_train_state() -> None:
    def state_of(scale: float, summaries: Any) -> TrainState:
        settings = {**SETTINGS, "gradient_noise_scale": scale, "key": 0, "summaries": summaries}
        return TrainState.create(apply_fn=None, params=PARAMS, tx=optloss.transformation(0, **settings))

    saved = state_of(0.01, None)
    for _ in range(3):
        saved = saved.apply_gradients(grads=jax.tree.map(np.ones_like, PARAMS))
    result, told = restored(flax.serialization.to_state_dict(saved), state_of(0.01, None))
    assert told == []
    assert_same_bits(result.params, saved.params)
    assert_same_bits(result.opt_state, saved.opt_state)
    result, told = restored(saved, state_of(0.02, ["gradient_norm"]))  # other figures are no difference
    assert told == ["opt_state/opt_state/gradient_noise_scale: saved with 0.01, now 0.02"]
    assert_same_bits(result.opt_state.opt_state.optimizer, saved.opt_state.opt_state.optimizer)


# ---- compatible ------------------------------------------------------------------------------------------------------

OP = "opt_states/OptimizeLoss/"


OTHER = "it is not what it was"
STAYS = "saved with 0.1, now 0.05; the saved rate goes on, since it is in the state"


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        ("learning_rate", 0.05, STAYS),
        ("gradient_noise_scale", 0.02, "saved with 0.01, now 0.02"),
        ("gradient_multipliers", {"hidden/bias": 0.6}, OTHER),
        ("optimizer", lambda rate: optloss.adam(rate, beta1=0.8), OTHER),
        ("nonfinite", "apply", OTHER),
        ("reproducible", True, OTHER),
        ("increment_global_step", False, OTHER),
        ("noise_generator", "threefry", OTHER),
        ("learning_rate_decay_fn", lambda rate, step: optloss.exponential_decay(rate, step, 100, 0.9), OTHER),
        ("clip_gradients", optloss.adaptive_clipping_fn(std_factor=3.0, global_step=True), OTHER),
    ],
)
def test_a_changed_setting_is_told_and_the_state_is_that_which_was_saved(argument: str, value: Any, told: str) -> None:
    saved, changed = trained(), {argument: value}
    result, lines = restored(containers_lost(saved), fresh(**changed))
    assert lines == [f"{OP}{argument}: {told}"]
    one, other = (state.opt_states["OptimizeLoss"]._replace(fingerprint=None) for state in (result, saved))
    assert_same_bits(one, other)
    assert_same_bits(result.params, saved.params)
    again, lines = restored(result, fresh(**changed))  # the new setting is in the fingerprint now
    assert lines == []
    assert_same_bits(again, result)


@pytest.mark.parametrize(
    ("stage", "setting", "off"), [("noise", "gradient_noise_scale", None), ("clip", "clip_gradients", 1.0)]
)
def test_a_stage_that_was_added_starts_fresh_and_one_that_was_taken_away_is_dropped(
    stage: str, setting: str, off: Any
) -> None:
    with_it, without = trained(), trained(**{setting: off})
    added, told = restored(without, fresh())
    assert f"{OP}{stage}: it was not saved like this and starts fresh" in told
    assert_same_bits(
        getattr(added.opt_states["OptimizeLoss"], stage), getattr(fresh().opt_states["OptimizeLoss"], stage)
    )
    assert_same_bits(added.opt_states["OptimizeLoss"].optimizer, without.opt_states["OptimizeLoss"].optimizer)
    removed, told = restored(with_it, fresh(**{setting: off}))
    assert any(line.startswith(f"{OP}{stage}/") and line.endswith("it was saved and is dropped") for line in told)
    assert_same_bits(removed.params, with_it.params)


def test_an_op_that_was_added_starts_fresh_and_one_that_was_taken_away_is_dropped() -> None:
    other = build(name="other", increment_global_step=False)
    both, one = other.init(trained(), key=2), trained()
    result, told = restored(containers_lost(one), other.init(fresh(), key=2))
    assert told == ["opt_states/other: it was not saved and starts fresh"]
    assert_same_bits(result.opt_states["other"], both.opt_states["other"])
    assert_same_bits(result.params, one.params)
    result, told = restored(containers_lost(both), fresh())
    assert told
    assert all(re.fullmatch(r"opt_states/other/.*: it was saved and is dropped", line) for line in told)
    assert_same_bits(result, one)


def test_a_checkpoint_from_before_there_were_fingerprints_is_told() -> None:
    saved = containers_lost(trained())
    del saved["opt_states"]["OptimizeLoss"]["fingerprint"]
    result, told = restored(saved, fresh())
    assert told == [f"{OP}fingerprint: none was saved, so that settings cannot be compared"]
    assert_same_bits(result.params, trained().params)


# ---- refused ---------------------------------------------------------------------------------------------------------


def renamed(params: Any) -> Any:
    return {"hidden": {"weight": params["hidden"]["kernel"], "bias": params["hidden"]["bias"]}}


def with_bias(bias: Any) -> Any:
    return {"hidden": {**PARAMS["hidden"], "bias": bias}}


GONE = "it was saved, and is not in the state now"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"optimizer": "RMSProp"}, [f"{OP}optimizer: another was saved"]),
        (
            {"params": with_bias(np.zeros(3, np.float32))},
            [f"{name}/hidden/bias: saved as float32[2], now float32[3]" for name in ("params", f"{OP}optimizer/m")],
        ),
        (
            {"params": with_bias(np.zeros(2, np.float16))},
            ["params/hidden/bias: saved as float32[2], now float16[2]"],
        ),
        (
            {"params": renamed(PARAMS), "gradient_multipliers": None},
            ["params/hidden/weight: it was not saved", f"params/hidden/kernel: {GONE}"],
        ),
        ({"params": {**PARAMS, "last": np.zeros(1, np.float32)}}, ["params/last: it was not saved"]),
        ({"variables": "hidden/bias"}, [f"{OP}optimizer/m/hidden/kernel: {GONE}"]),
    ],
)
def test_what_does_not_fit_is_refused_with_every_difference(changes: Any, messages: list[str]) -> None:
    with pytest.raises(ValueError, match="^saved: it does not fit this state:\n") as caught:
        optloss.restore(fresh(**changes), containers_lost(trained()))
    for message in messages:
        assert f"  {message}" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_an_optimizer_with_slots_of_the_same_names_is_refused() -> None:
    """Adam's moments would be taken for AdaBelief's, which has them under the same names."""
    saved = trained(optimizer=optax.adam)
    with pytest.raises(ValueError, match=f"{OP}optimizer: another was saved; its slots mean something else"):
        optloss.restore(fresh(optimizer=optax.adabelief), containers_lost(saved))


def test_a_step_below_zero_is_refused() -> None:
    saved = containers_lost(trained())
    saved["global_step"] = np.int32(-5)
    with pytest.raises(ValueError, match="global_step: saved as -5, and no count is below 0"):
        optloss.restore(fresh(), saved)


def test_many_differences_are_listed_in_part() -> None:
    saved, now = (
        fresh({f"{name}{i}": np.ones(1, np.float32) for i in range(11)}, gradient_multipliers=None) for name in "vw"
    )
    with pytest.raises(ValueError, match=r"and \d+ more$") as caught:
        optloss.restore(now, saved)
    assert len(str(caught.value).splitlines()) == 22


def test_a_state_without_an_op_is_an_error() -> None:
    with pytest.raises(ValueError, match="^state: got dict without an OptState in it"):
        optloss.restore(PARAMS, PARAMS)


# ---- fingerprints ----------------------------------------------------------------------------------------------------

PROGRAM = """
import jax.numpy as jnp, optloss
train = optloss.optimize_loss(
    lambda p: jnp.sum(p["w"]), 0, 0.1, "Ftrl", 0.01, {"w": lambda step: 0.5}, optloss.adaptive_clipping_fn(),
    lambda rate, step: optloss.cosine_decay(rate, step, 10), variables={"w": True}, key=0)
print(train.init({"w": jnp.zeros(3)}).opt_states["OptimizeLoss"].fingerprint.tolist())
"""


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_every_process() -> None:
    """Where sets and addresses are in another order."""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] != ""


def test_a_fingerprint_never_changes_in_a_step() -> None:
    one, other = (state.opt_states["OptimizeLoss"].fingerprint for state in (fresh(), trained(5)))
    np.testing.assert_array_equal(one, other)


def test_a_fingerprint_tells_the_key_that_a_function_holds() -> None:
    def noise(key: jax.Array, step: Any) -> Any:
        return jax.random.uniform(jax.random.fold_in(key, step))

    def fingerprint(seed: int) -> np.ndarray:
        settings: dict[str, Any] = {"gradient_noise_scale": functools.partial(noise, jax.random.key(seed))}
        return np.asarray(fresh(**settings).opt_states["OptimizeLoss"].fingerprint)

    np.testing.assert_array_equal(fingerprint(0), fingerprint(0))
    assert not np.array_equal(fingerprint(0), fingerprint(1))


def test_a_rate_is_told_apart_whether_it_is_a_number_or_an_array() -> None:
    rates = [0.1, np.float64(0.1), np.float32(0.1), jnp.float32(0.1)]
    prints = [np.asarray(fresh(learning_rate=rate).opt_states["OptimizeLoss"].fingerprint) for rate in rates]
    assert all(np.array_equal(each, prints[0]) for each in prints)
    assert not np.array_equal(fresh(learning_rate=0.11).opt_states["OptimizeLoss"].fingerprint, prints[0])


# ---- checksums -------------------------------------------------------------------------------------------------------


def mixed(x: np.ndarray) -> np.ndarray:
    """The bijection of words of 32 bits, in NumPy."""
    x = ((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)).astype(np.uint32)
    x = ((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)).astype(np.uint32)
    return x ^ (x >> np.uint32(16))


def test_checksums_are_the_sums_of_the_docstring() -> None:
    array = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    words = array.view(np.uint32).ravel()
    first = mixed(words ^ mixed(np.arange(words.size, dtype=np.uint32)))
    wanted = int(np.sum(first, dtype=np.uint64) % 2**32)
    assert optloss.checksums({"w": array})["w"].startswith(f"float32[7,5] {wanted:08x}")


@pytest.mark.parametrize(
    "dtype", ["f4", "f2", "i1", "u1", "?", "i4", "c8", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_an_array_of_numpy_has_the_checksum_of_jax_s(dtype: Any) -> None:
    array = (4 * np.random.default_rng(0).normal(size=(5, 3))).astype(dtype)
    assert optloss.checksums([array]) == optloss.checksums([jnp.asarray(array)])


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()])
def test_a_checksum_is_the_same_under_every_sharding(spec: PartitionSpec) -> None:
    array = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    assert optloss.checksums([jax.device_put(array, NamedSharding(mesh, spec))]) == optloss.checksums([array])


def test_containers_leave_checksums_as_they_are() -> None:
    state = trained()
    assert optloss.checksums(containers_lost(state)) == optloss.checksums(state) == optloss.checksums(by_msgpack(state))
    assert optloss.checksums(OrderedDict(a=np.zeros(2), b=1)).keys() == {"a", "b"}


def flipped(array: np.ndarray, bit: int) -> np.ndarray:
    data = bytearray(array.tobytes())
    data[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(bytes(data), array.dtype).reshape(array.shape)


@pytest.mark.slow
def test_every_one_of_ten_thousand_flipped_bits_is_noticed() -> None:
    draw, leaves = np.random.default_rng(0), [np.asarray(leaf) for leaf in jax.tree.leaves(trained())]
    sums = [optloss.checksums(leaf) for leaf in leaves]
    noticed = 0
    for _ in range(10_000):
        chosen = int(draw.integers(len(leaves)))
        leaf = flipped(leaves[chosen], int(draw.integers(8 * leaves[chosen].nbytes)))
        noticed += optloss.checksums(leaf) != sums[chosen]
    assert noticed == 10_000


def test_a_flipped_bit_is_an_error_that_names_the_array() -> None:
    state = trained()
    saved, sums = containers_lost(state), optloss.checksums(state)
    optloss.restore(fresh(), saved, sums)
    saved["params"]["hidden"]["kernel"] = flipped(saved["params"]["hidden"]["kernel"], 77)
    with pytest.raises(ValueError, match=r"^checksums: not .*\n  params/hidden/kernel: float32\[3,2\] \w+ instead of "):
        optloss.restore(fresh(), saved, sums)


def test_an_array_without_a_checksum_and_a_checksum_without_an_array_are_errors() -> None:
    state = trained()
    sums = optloss.checksums(state)
    del sums["global_step"]
    with pytest.raises(ValueError, match="global_step: it has no checksum"):
        optloss.restore(fresh(), state, sums)
    with pytest.raises(ValueError, match="params/gone: missing instead of x"):
        optloss.restore(fresh(), state, {**optloss.checksums(state), "params/gone": "x"})


def test_what_is_no_number_has_no_checksum() -> None:
    with pytest.raises(TypeError, match="^tree: 'w' is of type str"):
        optloss.checksums({"w": "text"})


def test_a_state_survives_pickle_unchanged() -> None:
    state = trained()
    assert optloss.checksums(pickle.loads(pickle.dumps(jax.device_get(state)))) == optloss.checksums(state)
