"""What a fault at run time leaves behind: bad numbers, steps at the ends of integers, hostile names, many traces."""

import ast
import copy
import functools
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import optax
import process_worker
import pytest
import test_layouts
import test_processes
from conftest import enable_x64
from fault_rows_running import RUNNING
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import optloss
from optloss import tensorboard

OPTIMIZERS = list(optloss.OPTIMIZER_CLS_NAMES)

# ---- bad numbers: faults x places x steps, for each row of a table of settings ---------------------------------------


class Settings(NamedTuple):
    """What is compiled: one program for each row, which all faults, places and steps share."""

    optimizer: str
    dtype: str
    transform: str  # "jit", "scan", "pmap" over eight devices, or "mesh": parameters cut over eight devices
    clip: str  # "adaptive" or "norm": to a norm of 1
    noise: float | None


DTYPES = ["float16", "bfloat16", "float32", "float64"]
TRANSFORMS = ["jit", "scan", "pmap", "mesh"]
CLIPS = ["adaptive", "norm"]
NOISES = [0.01, None]
TABLE = [
    Settings(optimizer, dtype, TRANSFORMS[(i + j) % 4], CLIPS[(i + j // 2) % 2], NOISES[(i // 2 + j) % 2])
    for i, optimizer in enumerate(OPTIMIZERS)
    for j, dtype in enumerate(DTYPES)
]
QUICK = [("SGD", "float64"), ("RMSProp", "float16")]
over_table = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id="-".join(map(str, row)), marks=() if row[:2] in QUICK else pytest.mark.slow)
        for row in TABLE
    ],
)

# The square of "overflow" is beyond its dtype, of "underflow" it vanishes; "denormal" is below the smallest normal.
EXTREMES = {
    "float16": {"overflow": 3e4, "underflow": 1e-4, "denormal": 6e-8},
    "bfloat16": {"overflow": 1e20, "underflow": 1e-30, "denormal": 1e-39},
    "float32": {"overflow": 1e20, "underflow": 1e-30, "denormal": 1e-40},
    "float64": {"overflow": 1e200, "underflow": 1e-200, "denormal": 1e-310},
}
# Powers of two that bring an overflow to about 1e4, where noise is nothing and squares are small.
SOFTER = {"float16": 2.0**-2, "bfloat16": 2.0**-54, "float32": 2.0**-54, "float64": 2.0**-650}
PLACES = ["loss", "model state", "element", "all"]  # the last two: in one element of the gradients, and in each
NOT_FINITE = [
    *itertools.product(["nan", "inf", "-inf"], PLACES),
    ("overflow", "model state"),  # which takes the square
]
FINITE = [
    (fault, place)
    for fault, place in itertools.product(["overflow", "underflow", "denormal", "zero"], PLACES)
    if (fault, place) not in NOT_FINITE
]
SHAPES: dict[str, tuple[int, ...]] = {"w": (8, 4), "b": (8,), "s": ()}
SPECS = {"w": P("x"), "b": P("x"), "s": P()}


def test_the_table_has_every_pair_of_settings() -> None:
    columns = [OPTIMIZERS, DTYPES, TRANSFORMS, CLIPS, NOISES]
    for (i, first), (j, second) in itertools.combinations(enumerate(columns), 2):
        assert {(row[i], row[j]) for row in TABLE} == set(itertools.product(first, second))


@jax.custom_vjp
def given(params: Any, batch: Any) -> jax.Array:
    """A loss whose value and gradients are those of the batch."""
    return batch["loss"]


given.defvjp(lambda params, batch: (batch["loss"], batch["gradients"]), lambda gradients, _: (gradients, None))


def loss_of(params: Any, mean_square: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The model state follows the mean square of an activation, as batch normalisation does."""
    return given(params, batch), 0.9 * mean_square + 0.1 * batch["activation"] ** 2


def good_batch(step: int, dtype: Any) -> dict[str, Any]:
    draw = np.random.default_rng(step)
    gradients = {name: draw.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
    return {"loss": np.asarray(1.0, dtype), "activation": np.arange(1, 4).astype(dtype), "gradients": gradients}


def bad_batch(step: int, dtype: Any, fault: str, place: str, factor: float = 1.0) -> dict[str, Any]:
    """The good batch of a step with a fault in it; in the gradients it has the sign of what was there."""
    batch = good_batch(step, dtype)
    values = EXTREMES[np.dtype(dtype).name] | {"zero": 0.0}
    value = values[fault] if fault in values else float(fault)
    if place == "loss":
        return batch | {"loss": np.asarray(value, dtype)}
    if place == "model state":
        return batch | {"activation": np.array([1.0, value, 3.0]).astype(dtype)}
    gradients = {name: np.copysign(factor * value, leaf).astype(dtype) for name, leaf in batch["gradients"].items()}
    if place == "element":  # any, of any leaf
        draw = np.random.default_rng(len(fault) + step)
        name = list(SHAPES)[draw.integers(len(SHAPES))]
        at = tuple(draw.integers(SHAPES[name]))
        gradients = batch["gradients"] | {name: batch["gradients"][name].copy()}
        gradients[name][at] = np.copysign(value, gradients[name][at])
    return batch | {"gradients": gradients}


class Training(NamedTuple):
    """The compiled step of a row of the table."""

    first: Any  # the state at step 0, as `states` has them
    states: Callable[[list[tuple[Any, Any]]], list[Any]]  # after each pair of batches: of device 3, and of the others


@functools.cache
def training_of(row: Settings) -> Training:
    train = optloss.optimize_loss(
        loss_of,
        0,
        0.1,
        row.optimizer,
        row.noise,
        {"w": 0.5},
        1.0 if row.clip == "norm" else optloss.adaptive_clipping_fn(global_step=True, report_summary=True),
        lambda rate, step: optloss.exponential_decay(rate, step, 10, 0.5),
        axis_name="x" if row.transform == "pmap" else None,
    )
    draw = np.random.default_rng(7)
    params = {name: draw.normal(size=shape).astype(row.dtype) for name, shape in SHAPES.items()}
    place, step = (lambda batch, _: batch), train.update
    if row.transform == "mesh":
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
        shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
        params = jax.device_put(params, shardings)
        whole = NamedSharding(mesh, P())
        where = {"loss": whole, "activation": whole, "gradients": shardings}
        place = lambda batch, _: jax.device_put(batch, where)  # noqa: E731
    first = train.init(params, key=0, model_state=np.ones(3, row.dtype))
    if row.transform == "pmap":
        first = jax.tree.map(lambda leaf: np.stack([leaf] * 8), first)
        place = lambda batch, other: jax.tree.map(lambda a, b: np.stack([b] * 3 + [a] + [b] * 4), batch, other)  # noqa: E731
        step = jax.pmap(train.update, axis_name="x", donate_argnums=0)
    if row.transform == "scan":
        return Training(as_arrays(first), functools.partial(scanned, jax.jit(scan_of(train.update)), first))

    def states(pairs: list[tuple[Any, Any]]) -> list[Any]:
        state, seen = jax.tree.map(jnp.copy, first), []
        for batch, other in pairs:
            state, _ = step(state, place(batch, other))
            seen.append(as_arrays(state) if row.transform != "pmap" else replica_of(state))
        return seen

    return Training(as_arrays(first) if row.transform != "pmap" else replica_of(first), states)


def scan_of(update: Callable[..., Any]) -> Callable[..., Any]:
    """A scan that gives the state after each step, too."""

    def step(state: Any, batch: Any) -> Any:
        state, _ = update(state, batch)
        return state, state

    return lambda state, batches: jax.lax.scan(step, state, batches)


def scanned(scan: Callable[..., Any], state: Any, pairs: list[tuple[Any, Any]]) -> list[Any]:
    """The state after each step, by scans of three steps."""
    seen = []
    for i in range(0, len(pairs), 3):
        state, stacked = scan(state, jax.tree.map(lambda *leaves: np.stack(leaves), *(a for a, _ in pairs[i : i + 3])))
        stacked = as_arrays(stacked)
        seen += [jax.tree.map(lambda leaf, j=j: leaf[j], stacked) for j in range(3)]
    return seen


def as_arrays(state: Any) -> Any:
    """Copies: a view would keep the buffer from being donated."""
    return jax.tree.map(np.array, state)


def replica_of(state: Any) -> Any:
    """The state that all replicas have, to the bit."""
    state = as_arrays(state)
    for leaf in jax.tree.leaves(state):
        assert {part.tobytes() for part in leaf} == {leaf[0].tobytes()}
    return jax.tree.map(lambda leaf: leaf[0], state)


def skipped(state: Any) -> int:
    return int(state.opt_states["OptimizeLoss"].nonfinite_steps)


def differences(got: Any, expected: Any) -> list[str]:
    """The arrays that differ in a bit, but for the count of skipped steps."""
    rows = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    paths = [jax.tree_util.keystr(path) for (path, a), b in rows if a.dtype != b.dtype or a.tobytes() != b.tobytes()]
    return [path for path in paths if not path.endswith(".nonfinite_steps")]


@over_table
def test_a_run_with_bad_batches_has_the_bits_of_the_run_without_them(row: Settings) -> None:
    """NaN and infinities anywhere, at step 0 and later, once and twice: nothing changes but the count.

    On eight devices with a batch each, one of them has the fault.
    """
    with enable_x64(row.dtype == "float64"):
        training = training_of(row)
        good = [(good_batch(i, row.dtype),) * 2 for i in range(3)]
        clean = [training.first, *training.states(good)]
        assert [int(state.global_step) for state in clean] == [0, 1, 2, 3]
        for fault, place in NOT_FINITE:
            bad = [(bad_batch(i, row.dtype, fault, place), good_batch(i, row.dtype)) for i in range(3)]
            states = training.states([bad[0], good[0], good[1], bad[1], bad[2], good[2]])
            for i, after in enumerate([0, 1, 2, 2, 2, 3]):
                assert differences(states[i], clean[after]) == [], (fault, place, i)
            assert [skipped(state) for state in states] == [1, 1, 1, 2, 3, 3], (fault, place)


@over_table
def test_a_step_of_extreme_numbers_is_taken_in_full_or_counted(row: Settings) -> None:
    """Finite numbers whose squares overflow or vanish, denormals and zeros, at step 0 and later."""
    with enable_x64(row.dtype == "float64"):
        training = training_of(row)
        good = [(good_batch(i, row.dtype),) * 2 for i in range(3)]
        clean = [training.first, *training.states(good)]
        for (fault, place), at in itertools.product(FINITE, (0, 1)):
            what = (fault, place, at)
            states = run_with(training, row, at, fault, place)
            for state in states:
                assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state)), what
            # A mean over replicas adds up in the dtype of what it is of.
            may_overflow = (row.transform, row.dtype) == ("pmap", "float16") and place != "model state"
            may_overflow |= row.clip == "adaptive" and place in ("element", "all")
            if skipped(states[at]):
                assert fault == "overflow", what
                assert may_overflow, what
                assert differences(states[at], clean[at]) == [], what
                assert skipped(states[-1]) == 1, what
            elif place in ("loss", "model state"):  # they move nothing else
                own = ".model_state" if place == "model state" else "none"
                assert [path for path in differences(states[-1], clean[-1]) if path != own] == [], what
            else:
                assert int(states[at].global_step) == at + 1, what
                check_step(training, row, at, fault, place, states)


def run_with(training: Training, row: Settings, at: int, fault: str, place: str, factor: float = 1.0) -> list[Any]:
    """The states of three steps, the one `at` of them with a fault."""
    pairs = [(good_batch(i, row.dtype),) * 2 for i in range(3)]
    pairs[at] = (bad_batch(at, row.dtype, fault, place, factor),) * 2
    return training.states(pairs)


def check_step(training: Training, row: Settings, at: int, fault: str, place: str, states: list[Any]) -> None:
    """What a step that was taken must have done with gradients that are the same everywhere."""
    before = training.first if at == 0 else states[at - 1]
    moved = differences(states[at].params, before.params)
    if place != "all":
        return
    if fault == "overflow":
        assert len(moved) == len(SHAPES)
        if row.clip == "norm":  # the direction alone counts: a softer gradient makes the same step, and the next one
            softer = run_with(training, row, at, fault, place, SOFTER[row.dtype])
            tolerance = {"float16": 4e-3, "bfloat16": 4e-2}.get(row.dtype, 1e-5)  # a few roundings
            for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(softer), strict=True):
                np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=tolerance, atol=tolerance)
    elif fault == "zero" and at == 0 and row.noise is None and row.optimizer != "Ftrl":  # that starts from the origin
        assert moved == []
    elif fault == "denormal" and row.dtype != "float16":  # whose denormals float32 tells from 0
        zeros = run_with(training, row, at, "zero", place)
        assert differences(states[at].params, zeros[at].params) == []


@pytest.mark.slow
def test_a_bad_batch_of_one_process_is_skipped_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of four devices, a row of the batch on each device; this file is their program."""
    monkeypatch.setattr(test_processes, "WORKER", Path(__file__))
    first, second = test_processes.run("one bad row", 2, 4)
    assert first == second
    assert first["with it"] == first["without it"]
    assert first["skipped"] == 1


def one_bad_row() -> dict[str, Any]:
    """What a process has after steps of which one had infinity in a row that lies on the second process."""
    specs = layouts.layout("rows", 8).specs
    mesh = layouts.mesh_of((8,), 8, AxisType.Auto)
    train = optloss.optimize_loss(layouts.given, 0, **test_layouts.settings_of("Adam", "adaptive"))
    found: dict[str, Any] = {}
    for name, steps in {"with it": [0, -1, 1], "without it": [0, 1]}.items():
        state = train.init(layouts.place(layouts.parameters(), specs, mesh), key=0)
        for step in steps:
            parts = layouts.batch(abs(step))
            parts["w"][6, 3, 3] = np.inf if step < 0 else parts["w"][6, 3, 3]
            state, _ = train.update(state, layouts.place_rows(parts, mesh))
        found["skipped"] = max(skipped(state), found.get("skipped", 0))
        state = optax.tree.set(state, nonfinite_steps=None)
        found[name] = [process_worker.whole(leaf).tobytes().hex() for leaf in jax.tree.leaves(state)]
    return found


def test_a_bad_member_of_a_vmap_is_skipped_alone() -> None:
    """The seven others make the step that they make by themselves."""
    train = optloss.optimize_loss(given, 0, 0.1, "Momentum", clip_gradients=optloss.adaptive_clipping_fn())
    first = train.init({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
    batches = [good_batch(i, np.float32) for i in range(8)]
    batches[5] = bad_batch(5, np.float32, "nan", "element")
    members = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), first)
    together, _ = jax.vmap(train.update)(members, jax.tree.map(lambda *leaves: np.stack(leaves), *batches))
    assert differences(jax.tree.map(lambda leaf: np.array(leaf[5]), together), as_arrays(first)) == []
    for i, batch in enumerate(batches):
        alone, _ = train.update(jax.tree.map(jnp.copy, first), batch)
        assert skipped(alone) == (i == 5)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


@pytest.mark.slow
def test_a_scan_a_loop_and_a_fori_loop_of_steps_have_the_same_bits() -> None:
    train = optloss.optimize_loss(given, 0, 0.1, "Adam", 0.01, {"w": 0.5}, 1.0)
    params = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[good_batch(i, np.float32) for i in range(5)])

    def at(i: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[i], batches)

    looped = train.init(params, key=0)
    for i in range(5):
        looped, _ = train.update(looped, at(i))
    scanned, _ = jax.lax.scan(train.update, train.init(params, key=0), batches)
    by_fori = jax.lax.fori_loop(0, 5, lambda i, state: train.update(state, at(i))[0], train.init(params, key=0))
    assert differences(as_arrays(scanned), as_arrays(looped)) == []
    assert differences(as_arrays(by_fori), as_arrays(looped)) == []


@pytest.mark.parametrize("skips", [True, False])
def test_a_bad_micro_batch_poisons_no_parameter(skips: bool) -> None:
    """Told to, Optax's MultiSteps leaves it out; else it keeps the NaN for good, and every step is skipped and counted.

    The first step of Adam is the rate, whatever the gradient.
    """
    optimizer = optax.MultiSteps(
        optloss.transformation(0, 0.1, "Adam"), 4, should_skip_update_fn=optax.skip_not_finite if skips else None
    )
    update, params = jax.jit(optimizer.update), {"w": jnp.zeros(3)}
    state = optimizer.init(params)
    for gradient in [1.0, 2.0, np.nan, 3.0, 4.0] if skips else [1.0, 2.0, np.nan, 3.0, 4.0, 5.0, 6.0, 7.0]:
        updates, state = update({"w": jnp.full(3, gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], -0.1 if skips else 0.0, rtol=1e-6)
    inner = state.inner_opt_state
    assert (int(inner.global_step), int(inner.opt_state.nonfinite_steps)) == ((1, 0) if skips else (0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_gradient_through_two_steps_is_that_of_differences(optimizer: str) -> None:
    """With respect to the rate and the parameters; central differences in float64."""
    with enable_x64(True):

        @jax.jit
        def final(rate: jax.Array, w: jax.Array) -> jax.Array:
            train = optloss.optimize_loss(lambda p: jnp.sum(jnp.sin(p["w"])), 0, rate, optimizer, clip_gradients=0.5)
            state, _ = train.update(train.init({"w": w}))
            state, _ = train.update(state)
            return jnp.sum(state.params["w"] ** 2)

        rate, w, h = jnp.float64(0.1), jnp.linspace(0.1, 1.0, 3), 1e-5
        of_rate, of_w = jax.grad(final, argnums=(0, 1))(rate, w)
        assert float(of_rate) == pytest.approx(float(final(rate + h, w) - final(rate - h, w)) / (2 * h), rel=1e-6)
        for i in range(3):
            e = h * jnp.eye(3)[i]
            assert float(of_w[i]) == pytest.approx(float(final(rate, w + e) - final(rate, w - e)) / (2 * h), rel=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "params", "gradients"),
    [
        ("SGD", "bfloat16", "float32"),
        ("Adam", "bfloat16", "float32"),
        ("Momentum", "float32", "bfloat16"),
        ("RMSProp", "float32", "float16"),
        ("Adagrad", "float16", "float64"),
        ("Ftrl", "float64", "bfloat16"),
    ],
)
def test_gradients_of_another_dtype_leave_the_state_s_types(optimizer: str, params: str, gradients: str) -> None:
    with enable_x64("float64" in (params, gradients)):
        transformation = optloss.transformation(0, 0.1, optimizer, 0.01, clip_gradients=1.0, key=0)
        tree = {name: jax.ShapeDtypeStruct(shape, params) for name, shape in SHAPES.items()}
        before = jax.eval_shape(transformation.init, tree)
        given = {name: jax.ShapeDtypeStruct(shape, gradients) for name, shape in SHAPES.items()}
        updates, after = jax.eval_shape(transformation.update, given, before, tree)
        assert types(after) == types(before)
        assert types(updates) == types(given)


def types(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


@pytest.mark.slow
def test_the_norm_of_400_arrays_of_bfloat16_is_clipped_to_the_limit() -> None:
    """Optax's own norm of them is 10 % low, since it adds them up in bfloat16."""
    leaves = [np.random.default_rng(i).normal(size=1000).astype(jnp.bfloat16) for i in range(400)]
    norm = norm_of(leaves)
    clip = optloss.clip_by_global_norm(0.5 * norm)  # a power of two: no product is rounded
    clipped, _ = jax.jit(clip.update)(leaves, clip.init(leaves))
    assert norm_of(clipped) == pytest.approx(0.5 * norm, rel=1e-6)


@pytest.mark.slow
def test_the_norm_of_1e8_numbers_is_right_to_a_millionth() -> None:
    block = np.random.default_rng(0).normal(size=10**6).astype(jnp.bfloat16)
    expected = 10 * norm_of([block])
    assert float(jax.jit(optloss.global_norm)(jnp.tile(block, 100))) == pytest.approx(expected, rel=1e-6)


def norm_of(leaves: list[Any]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves)))


@pytest.mark.slow
def test_the_adaptive_deviation_is_right_through_a_million_norms_from_1e_30_to_1e30() -> None:
    """Against the same averages in float64; two norms in a million are not finite, and left out."""
    waves = 29 * np.sin(np.arange(10**6) / 1000) + 0.3 * np.random.default_rng(3).normal(size=10**6)
    norms = (10.0**waves).astype(np.float32)
    norms[[1000, 500_000]] = np.nan, np.inf
    clip = optloss.adaptive_clipping_fn(global_step=True, report_summary=True, epsilon=1e-30)

    def step(state: Any, norm: jax.Array) -> Any:
        _, state = clip.update({"w": norm}, state)
        return state, (state.variance, state.max_norm)

    state, (variances, limits) = jax.jit(lambda s, n: jax.lax.scan(step, s, n))(clip.init({"w": jnp.zeros(())}), norms)
    mean, variance, n = 0.0, 0.0, 0
    expected = np.empty(len(norms))
    for i, norm in enumerate(norms.astype(np.float64).tolist()):
        if np.isfinite(norm):
            decay, distance = min(0.95, n / (n + 1)), math.log(norm + 1e-30) - mean
            variance = decay * (variance + (1 - decay) * distance**2)
            mean, n = mean + (1 - decay) * distance, n + 1
        expected[i] = variance
    assert int(state.step) == n == 10**6 - 2
    np.testing.assert_allclose(np.sqrt(np.asarray(variances, np.float64))[1:], np.sqrt(expected)[1:], rtol=1e-3)
    assert np.all(np.isfinite(limits))


# ---- steps at the ends of integers, a million steps, traces ----------------------------------------------------------

LATE_STEPS = [*range(2**24 - 3, 2**24 + 4), *range(2**31 - 4, 2**31)]
PERIODS = [1, 7, 2**24 + 1, 2**31 - 1]


def half_cosine(fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * fraction))


# Of a rate of 1, as functions of (step, period): ours, and the formula in Python's integers and floats.
HALF, NEAR_ONE = 0.5, float(np.float32(0.96))
DECAYS: dict[str, tuple[Callable[[Any, int], Any], Callable[[int, int], float]]] = {
    "exponential": (lambda s, n: optloss.exponential_decay(1.0, s, n, 0.96), lambda s, n: NEAR_ONE ** (s / n)),
    "exponential stairs": (
        lambda s, n: optloss.exponential_decay(1.0, s, n, 0.96, staircase=True), lambda s, n: NEAR_ONE ** (s // n)
    ),
    "natural": (lambda s, n: optloss.natural_exp_decay(1.0, s, n, HALF), lambda s, n: math.exp(-HALF * s / n)),
    "natural stairs": (
        lambda s, n: optloss.natural_exp_decay(1.0, s, n, HALF, staircase=True), lambda s, n: math.exp(-HALF * (s // n))
    ),
    "inverse time": (lambda s, n: optloss.inverse_time_decay(1.0, s, n, HALF), lambda s, n: 1 / (1 + HALF * s / n)),
    "inverse time stairs": (
        lambda s, n: optloss.inverse_time_decay(1.0, s, n, HALF, staircase=True), lambda s, n: 1 / (1 + HALF * (s // n))
    ),
    "polynomial": (lambda s, n: optloss.polynomial_decay(1.0, s, n, 0.0), lambda s, n: 1 - min(s, n) / n),
    "polynomial cycle": (
        lambda s, n: optloss.polynomial_decay(1.0, s, n, 0.0, cycle=True), lambda s, n: 1 - s / (n * -(-s // n))
    ),
    "cosine": (lambda s, n: optloss.cosine_decay(1.0, s, n), lambda s, n: half_cosine(min(s, n) / n)),
    "cosine restarts": (
        lambda s, n: optloss.cosine_decay_restarts(1.0, s, n, 1.0), lambda s, n: half_cosine(s % n / n)
    ),
    "linear cosine": (
        lambda s, n: optloss.linear_cosine_decay(1.0, s, n, beta=0.0),
        lambda s, n: (1 - min(s, n) / n) * half_cosine(min(s, n) / n),
    ),
    "piecewise": (
        lambda s, n: optloss.piecewise_constant(s, [n, 2**31 - 2], [1.0, 0.5, 0.25]),
        lambda s, n: 1.0 if s <= n else 0.5 if s <= 2**31 - 2 else 0.25,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECAYS)
def test_a_decay_is_right_at_steps_beyond_2_24_and_at_the_last(name: str) -> None:
    """To 5e-7 of the initial rate, as the recorded tables; float32 does not tell these steps from their neighbours."""
    ours, formula = DECAYS[name]
    off = 0.0
    for period in PERIODS[:-1] if name == "piecewise" else PERIODS:
        expected = np.array([formula(step, period) for step in LATE_STEPS])
        traced = jax.jit(jax.vmap(lambda step, period=period: ours(step, period)))(np.array(LATE_STEPS, np.int32))
        np.testing.assert_allclose(np.asarray(traced, float), expected, rtol=0, atol=5e-7, err_msg=str(period))
        at_end = [float(ours(step, period)) for step in LATE_STEPS[-2:]]
        np.testing.assert_allclose(at_end, expected[-2:], rtol=0, atol=5e-7, err_msg=str(period))
        rounded = [formula(int(np.float32(step)), period) for step in LATE_STEPS]
        off = max(off, float(np.abs(rounded - expected).max()))
    if "stairs" in name or name in ("cosine restarts", "piecewise"):
        assert off > 1e-2  # so the test can fail


def test_steps_at_the_end_of_int32_count_to_the_last_and_stay() -> None:
    """The rate halves every other step from 2**31 - 7 on; SGD on a gradient of 1 sums the rates up."""
    train = optloss.optimize_loss(
        lambda w: w, 2**31 - 5, 1.0, "SGD", learning_rate_decay_fn=lambda rate, step: rate * 0.5 ** ((step & 7) // 2)
    )
    state, steps, rates = train.init(0.0), [], []
    for _ in range(6):
        state, out = train.update(state)
        steps.append(int(state.global_step))
        rates.append(float(out.summaries["OptimizeLoss/learning_rate"]))
    assert steps == [2**31 - 4, 2**31 - 3, 2**31 - 2, 2**31 - 1, 2**31 - 1, 2**31 - 1]
    assert rates == [0.5, 0.25, 0.25, 0.125, 0.125, 0.125]
    assert float(state.params) == -sum(rates)


@pytest.mark.slow
def test_a_million_steps_keep_memory_types_and_counts() -> None:
    """One in a thousand is bad; ten scans of 100,000 steps by one program."""
    train = optloss.optimize_loss(
        given, 0, 1e-3, "Adam", 0.01, {"w": 0.5}, optloss.adaptive_clipping_fn(global_step=True),
        lambda rate, step: optloss.cosine_decay_restarts(rate, step, 1000),
    )  # fmt: skip
    batch = jax.tree.map(jnp.asarray, good_batch(0, np.float32))

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(state: Any, batch: Any) -> Any:
        def step(state: Any, i: jax.Array) -> Any:
            return train.update(state, batch | {"loss": jnp.where(i % 1000 == 999, jnp.nan, 1.0)})[0], None

        return jax.lax.scan(step, state, jnp.arange(100_000))[0]

    state = train.init({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}, key=0)
    before, sizes = types(state), []
    for _ in range(10):
        state = steps(state, batch)
        jax.block_until_ready(state)
        sizes.append(sum(leaf.nbytes for leaf in jax.live_arrays()))
    assert types(state) == before
    assert len(set(sizes)) == 1
    assert steps._cache_size() == 1
    opt_state = state.opt_states["OptimizeLoss"]
    assert (int(state.global_step), skipped(state), int(opt_state.noise.step)) == (999_000, 1000, 999_000)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


COMPILED: list[str] = []  # what JAX reports; a listener stays for good
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILED.append(name) if name.endswith("backend_compile_duration") else None
)
KINDS: dict[str, tuple[Callable[[], Any], bool]] = {
    "NumPy": (lambda: {"w": np.ones(3, np.float32), "b": np.ones(())}, False),
    "Python scalars": (lambda: {"w": 1.0, "b": 2}, False),
    "weak types": (lambda: {"w": jnp.broadcast_to(jnp.asarray(1.0), 3), "b": jnp.asarray(1.0)}, False),
    "bfloat16": (lambda: {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((), jnp.bfloat16)}, False),
    "mixed": (lambda: {"w": jnp.ones(3, jnp.float16), "b": 1.0, "n": np.int32(3)}, False),
    "float64": (lambda: {"w": np.ones(3), "b": 1.0}, True),
    "float32 with x64": (lambda: {"w": np.ones(3, np.float32), "b": np.float32(1.0)}, True),
}
RESTORED: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda leaf: leaf,
    "NumPy's": np.array,
    "put on a device": lambda leaf: jax.device_put(leaf, jax.devices()[0]),
}


@pytest.mark.parametrize(
    ("kind", "restored"),
    [*((kind, "as it is") for kind in KINDS), ("Python scalars", "NumPy's"), ("bfloat16", "put on a device")],
)
def test_steps_after_the_first_are_neither_traced_nor_compiled(kind: str, restored: str) -> None:
    """Whatever `init` was given, and whatever arrays a state came back as."""
    params, x64 = KINDS[kind]
    traces = []

    def loss(params: Any, x: Any) -> jax.Array:
        traces.append(1)
        return jnp.sum(params["w"] * x).astype(jnp.float32) + jnp.square(params["b"]).astype(jnp.float32)

    with enable_x64(x64):
        train = optloss.optimize_loss(loss, 0, 0.1, "Adam")
        state = jax.tree.map(RESTORED[restored], train.init(params()))
        state, _ = train.update(state, np.float32(0))
        COMPILED.clear()
        for step in range(1, 20):
            state, _ = train.update(state, np.float32(step))
    assert len(traces) == 1
    assert COMPILED == []


SWITCHES: dict[str, Callable[[], Any]] = {
    "checking_leaks": jax.checking_leaks,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "x64": lambda: enable_x64(True),
    "without jit": jax.disable_jit,
}


def two_steps() -> list[np.ndarray]:
    """With all stages on; the state's arrays."""
    decay, clip = (lambda rate, step: optloss.exponential_decay(rate, step, 10, 0.5)), optloss.adaptive_clipping_fn()
    train = optloss.optimize_loss(loss_of, 0, 0.1, "Adam", 0.01, {"w": 0.5}, clip, decay)
    params = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    state = train.init(params, key=0, model_state=np.ones(3, np.float32))
    for step in range(2):
        state, _ = train.update(state, good_batch(step, np.float32))
    return jax.tree.leaves(as_arrays(state))


two_plain_steps = functools.cache(two_steps)


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_init_and_updates_are_the_same_under_every_switch_of_jax(switch: str) -> None:
    expected = two_plain_steps()
    with SWITCHES[switch]():
        got = two_steps()
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        assert a.dtype == b.dtype or (switch, a.dtype) == ("x64", np.int64)


def test_noise_hangs_on_no_setting_of_jax_s_generators() -> None:
    def draw() -> Any:
        noise, zeros = optloss.add_gradient_noise(1.0, 3), jnp.zeros(100)
        return noise.update(zeros, noise.init(zeros))[0]

    expected = draw()
    for flags in (jax.threefry_partitionable(False), jax.threefry_partitionable(True), jax.default_prng_impl("rbg")):
        with flags:
            np.testing.assert_array_equal(draw(), expected)


# ---- the state in other hands ----------------------------------------------------------------------------------------


def test_a_view_of_the_state_keeps_its_numbers_through_an_update() -> None:
    train = optloss.optimize_loss(jnp.sum, 0, 0.1, "SGD")
    state = train.init(jnp.ones(1000))
    views = [np.asarray(state.params), np.from_dlpack(state.params)]
    after, _ = train.update(state)
    for view in views:
        np.testing.assert_array_equal(view, 1.0)
    np.testing.assert_allclose(after.params, 0.9)


def test_of_two_threads_that_update_one_state_one_is_told() -> None:
    train = optloss.optimize_loss(jnp.sum, 0, 0.5, "SGD")
    train.update(train.init(jnp.ones(3)))
    for _ in range(20):
        state, start, results = train.init(jnp.ones(3)), threading.Barrier(2), []

        def update(state: Any = state, start: Any = start, results: Any = results) -> None:
            start.wait()
            try:
                results.append(train.update(state)[0].params.tolist())
            except ValueError as error:
                results.append(type(error))

        threads = [threading.Thread(target=update) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results, key=str) == [ValueError, [0.5, 0.5, 0.5]]


def test_a_train_op_is_hashed_and_copied_and_its_state_pickled() -> None:
    train = optloss.optimize_loss(jnp.sum, 0, 0.5, "Adam", 0.01)
    assert hash(train) == hash(train)
    twin, state = copy.deepcopy(train), train.init(jnp.ones(3), key=0)
    for kept in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert differences(as_arrays(twin.update(kept)[0]), as_arrays(train.update(copy.deepcopy(state))[0])) == []
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match="pickle"):
        pickle.dumps(train)


# ---- hostile names and settings --------------------------------------------------------------------------------------

HOSTILE = [
    "a\nb",
    "\x1b[31mred",
    "..",
    "../../evil",
    "",
    "x" * 300,
    "ünï/名前",
    "tab\there",
    "\r",
    "null\0",
    "\x85",
    " ",
]


def has_control_character(text: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in text)


def hostile_op(**settings: Any) -> optloss.TrainOp:
    return optloss.optimize_loss(
        lambda params: sum(jnp.sum(leaf**2) for leaf in params.values()), 0, 0.1, "SGD", **settings
    )


def hostile_params() -> dict[str, Any]:
    return {name: np.full(2, 1.0, np.float32) for name in HOSTILE}


def test_parameters_of_hostile_names_train() -> None:
    train = hostile_op(gradient_noise_scale=1e-3, gradient_multipliers=dict.fromkeys(HOSTILE, 0.5))
    state, _ = train.update(train.init(hostile_params(), key=0))
    for leaf in state.params.values():  # 1 - 0.1 * 0.5 * 2, within two deviations of noise
        np.testing.assert_allclose(leaf, 0.9, atol=1.1e-4)
    assert len({leaf.tobytes() for leaf in as_arrays(state.params).values()}) == len(HOSTILE)


def test_explain_has_a_line_for_each_hostile_name() -> None:
    explained = hostile_op(gradient_multipliers=dict.fromkeys(HOSTILE, 0.5)).explain(hostile_params())
    lines = repr(explained).split("\n")
    assert not any(has_control_character(line) for line in lines)
    first, last = (i for i, line in enumerate(lines) if line == "")
    assert last - first - 2 == len(HOSTILE)
    assert [row["name"] for row in explained.to_dict()["parameters"]] == sorted(HOSTILE)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_multipliers": {"no\nne": 1.0}},
        {"gradient_multipliers": {"\x1b[31mrad": 1.0}},  # the nearest is named
        {"gradient_multipliers": {"*\x1b*": 1.0, "\x1b*": 1.0}},  # both match
        {"variables": ["a\nc"]},
        {"optimizer": "Ad\x1b[0mam"},
        {"summaries": ["lo\nss"]},
        {"nonfinite": "\x1b"},
        {"gradient_noise_scale": "\x1b"},
        {"name": "\x1b[2J\nop"},
    ],
)
def test_an_error_shows_no_control_character(settings: dict[str, Any]) -> None:
    arguments = {"optimizer": "SGD", **settings}
    with pytest.raises((TypeError, ValueError)) as caught:
        optloss.optimize_loss(lambda params: params["a\nb"][0], 0, 0.1, **arguments).init(hostile_params(), key=0)
    assert not has_control_character(str(caught.value))


def test_summaries_of_hostile_names_stay_in_the_folder_of_the_log(tmp_path: Path) -> None:
    train = hostile_op(summaries=optloss.OPTIMIZER_SUMMARIES, name="../op")
    _, out = train.update(train.init(hostile_params()))
    with tensorboard.AsyncWriter(tensorboard.EventFileWriter(tmp_path / "a" / "log")) as writer:
        writer.write(out.summaries, 0)
    assert writer.dropped == 0
    assert [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()] == [("a", "log")]
    tags = EventAccumulator(str(tmp_path / "a" / "log")).Reload().Tags()
    assert {*tags["scalars"], *tags["histograms"]} == set(out.summaries)


@pytest.mark.parametrize("pattern", ["(a+)+$", "*" * 1000 + "b", "*a" * 500, "[" * 1000])
def test_a_hostile_pattern_among_ten_thousand_names_ends(pattern: str) -> None:
    """No backtracking matcher would come back from the stars; no setting is a regular expression."""
    params = {f"layer_{i}/kernel": jax.ShapeDtypeStruct((), np.float32) for i in range(10_000)}
    params["a" * 40 + "!"] = params["layer_0/kernel"]
    with pytest.raises(ValueError, match="^gradient_multipliers: no parameter"):
        optloss.multiply_gradients({pattern: 1.0}).init(params)


# What could run code, or a program, or read what holds code.
MODULES = {
    *("builtins", "code", "codeop", "cloudpickle", "ctypes", "dill", "imp", "importlib", "joblib", "marshal", "pickle"),
    *("pkgutil", "pty", "re", "regex", "runpy", "shelve", "subprocess", "urllib", "http", "yaml", "zipimport"),
}
CALLS = {"__import__", "compile", "eval", "exec", "globals", "import_module", "load", "loads", "popen", "system"}
CALLS |= {name for name in dir(os) if name.startswith(("exec", "spawn", "posix_spawn", "fork"))}
PACKAGE = sorted(Path(optloss.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_no_module_can_run_what_a_setting_or_a_file_says(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & MODULES
    called = {node.func for node in nodes if isinstance(node, ast.Call)}
    names = {getattr(function, "id", getattr(function, "attr", "")) for function in called}
    assert not names & CALLS
    assert not {word.arg for node in nodes if isinstance(node, ast.Call) for word in node.keywords} & {"allow_pickle"}


def in_a_fresh_process(program: str) -> Any:
    """What a program prints, as JSON; it writes no byte code, which would be files of Python's own."""
    command = [sys.executable, "-B", "-c", program]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


AUDITED = """
import json, os, sys, threading
seen, loads_code = [], ()
outside = ("socket", "subprocess", "shutil", "tempfile", "urllib", "http")
changes = ("mkdir", "rename", "remove", "system", "exec", "fork", "posix_spawn")
def look(event, arguments):
    if event == "open":
        mode, flags = arguments[1:3]
        writes = any(c in "wax+" for c in mode) if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
    else:
        writes = event.split(".")[0] in outside or event in [f"os.{change}" for change in changes]
    if writes or event in loads_code:
        seen.append(f"{event} {arguments}")
sys.addaudithook(look)
"""


def test_importing_it_opens_no_socket_writes_no_file_and_starts_no_thread() -> None:
    program = """
import jax
settings = dict(jax.config.values)
import optloss, optloss.tensorboard
print(json.dumps([seen, threading.active_count(), settings == jax.config.values]))
"""
    assert in_a_fresh_process(AUDITED + program) == [[], 1, True]


def test_a_setting_that_is_code_is_refused_and_not_run() -> None:
    program = """
import optloss
def is_refused(**settings):
    try:
        optloss.optimize_loss(abs, 0, 0.1, **{"optimizer": "SGD", **settings})
    except (TypeError, ValueError):
        return True
arguments = ["optimizer", "clip_gradients", "gradient_noise_scale", "learning_rate_decay_fn", "noise_generator"]
code = ["__import__('os').system('true')", "os", "builtins", "apply_updates", "__loader__", "lambda rate: 1"]
is_refused(optimizer="no such name")  # what an error imports is there now
loads_code = ("exec", "compile", "import", "marshal.loads", "pickle.find_class")
refused = [is_refused(**{argument: setting}) for argument in arguments for setting in code]
loads_code = ()
print(json.dumps([seen, refused]))
"""
    assert in_a_fresh_process(AUDITED + program) == [[], [True] * 30]


# ---- the matrix ------------------------------------------------------------------------------------------------------

SECTIONS = {"C": 21, "D": 10, "E": 13, "F": 8, "G": 14, "H": 9, "J": 6, "K": 8}


def test_every_row_of_a_running_fault_is_there_and_names_tests_that_are_there_or_a_reason() -> None:
    numbers = list(dict.fromkeys(row.number.rstrip("abcdefgh") for row in RUNNING))
    expected = [f"{letter}{i}" for letter, count in SECTIONS.items() for i in range(1, count + 1)]
    assert numbers == [*expected, *map(str, range(1, 21))]
    known = {
        f"{path.name}::{node.name}"
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for row in RUNNING:
        assert bool(row.tests) != bool(row.why_not), row.number
        assert {test.split("[")[0] for test in row.tests} <= known, row.number
        assert "" not in (row.fault, row.outcome), row.number


if __name__ == "__main__":
    process_worker.start(sys.argv[1], *map(int, sys.argv[2:5]))
    print("RESULT", json.dumps(one_bad_row()), flush=True)
