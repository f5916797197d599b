"""The contract of every transformation, and of the whole step: rows of transformations times properties."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import enable_x64
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optloss


def exponential_decay(rate: Any, step: Any) -> jax.Array:
    return optloss.exponential_decay(rate, step, 2, 0.9)


def falling(step: jax.Array) -> jax.Array:
    return 1 / (1 + step.astype(jnp.float32))


def linear_loss(params: Any, gradients: Any) -> jax.Array:
    """A loss whose gradients are the given ones."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True)
    wide = [(jnp.ravel(p).astype(jnp.float32), jnp.ravel(g).astype(jnp.float32)) for p, g in pairs if is_float(p)]
    return jnp.sum(jnp.stack([jnp.sum(p * g) for p, g in wide]))


def whole(builder: Callable[..., Any], *loss: Any) -> Any:
    """The pipeline with every setting on."""
    return builder(
        *loss,
        global_step=0,
        learning_rate=0.1,
        optimizer="Adam",
        gradient_noise_scale=0.01,
        gradient_multipliers={"**": falling},
        clip_gradients=optloss.adaptive_clipping_fn(global_step=True, report_summary=True),
        learning_rate_decay_fn=exponential_decay,
        summaries=optloss.OPTIMIZER_SUMMARIES,
        key=0,
    )


ROWS: dict[str, Callable[[], Any]] = {
    "noise": lambda: optloss.add_gradient_noise(0.01, key=0),
    "multiply": lambda: optloss.multiply_gradients({"**": 0.5}),
    "multiply_by_step": lambda: optloss.multiply_gradients({"**": falling}),
    "clip": lambda: optloss.clip_by_global_norm(1.0),
    "adaptive_clip": lambda: optloss.adaptive_clipping_fn(),
    "adaptive_clip_by_step": lambda: optloss.adaptive_clipping_fn(global_step=True, report_summary=True),
    "decayed_rate": lambda: optloss.scale_by_decayed_learning_rate(0.1, exponential_decay),
    "sgd": lambda: optloss.sgd(0.1),
    "momentum": lambda: optloss.momentum(0.1, momentum=0.9),
    "nesterov": lambda: optloss.momentum(0.1, momentum=0.9, use_nesterov=True),
    "adagrad": lambda: optloss.adagrad(0.1),
    "adam": lambda: optloss.adam(0.1),
    "adam_schedule": lambda: optloss.adam(optax.exponential_decay(0.1, 2, 0.9)),
    "rmsprop": lambda: optloss.rmsprop(0.1),
    "rmsprop_centered": lambda: optloss.rmsprop(0.1, momentum=0.9, centered=True),
    "ftrl": lambda: optloss.ftrl(0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.01),
    "transformation": lambda: whole(optloss.transformation),
    "optimize_loss": lambda: whole(optloss.optimize_loss, linear_loss),
}
PIPELINES = ["transformation", "optimize_loss"]


class Layer(NamedTuple):
    """Parameters in a NamedTuple."""

    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """Parameters in a dataclass."""

    kernel: Any
    bias: Any


KERNEL, BIAS = np.linspace(-1, 1, 16, dtype=np.float32).reshape(8, 2), np.linspace(0.5, 2, 8, dtype=np.float32)
PARAMS = {"kernel": KERNEL, "scale": np.float32(2)}
TREES = {
    "dict": {"dense": {"kernel": KERNEL}, "bias": BIAS},
    "list": [KERNEL, BIAS],
    "tuple": (KERNEL, BIAS),
    "namedtuple": Layer(KERNEL, BIAS),
    "dataclass": Block(KERNEL, BIAS),
    "frozendict": flax.core.FrozenDict({"dense": {"kernel": KERNEL}, "bias": BIAS}),
    "array": KERNEL,
    "none_leaf": {"kernel": KERNEL, "none": None},
    "empty_leaf": {"kernel": KERNEL, "empty": np.zeros((0, 3), np.float32)},
    "scalar_leaf": {"kernel": KERNEL, "scalar": np.float32(2)},
}
DTYPES = {
    "bfloat16": [jnp.bfloat16],
    "float16": [jnp.float16],
    "float32": [jnp.float32],
    "float64": [jnp.float64],
    "mixed": [jnp.bfloat16, jnp.float16, jnp.float32],
    "mixed_with_float64": [jnp.bfloat16, jnp.float32, jnp.float64],
}

every_row = pytest.mark.parametrize("row", ROWS)
# For tests that compile a step anew, which takes the pipeline more than two seconds.
every_row_anew = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow) if row in PIPELINES else row for row in ROWS]
)


class Face(NamedTuple):
    """What all rows have in common: `init(params) -> carry` and `step(carry, gradients) -> (carry, output)`."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any], tuple[Any, Any]]  # as the package gives it
    jitted: Callable[[Any, Any], tuple[Any, Any]]  # with the carry donated


@functools.cache
def face(row: str) -> Face:
    """A train op's functions as they are; of a transformation the carry is (params, state), the output its updates."""
    made = ROWS[row]()
    if isinstance(made, optloss.TrainOp):
        return Face(made.init, made.update, made.update)

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.array, params), made.init(params)

    def step(carry: Any, gradients: Any) -> tuple[Any, Any]:
        params, state = carry
        updates, state = made.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), updates

    # What a step does not read, such as the last summaries, would else be kept and not donated.
    return Face(init, step, jax.jit(step, donate_argnums=0, keep_unused=True))


def is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.array, tree)


def cast(dtypes: str) -> Any:
    return {np.dtype(dtype).name: KERNEL.astype(dtype) for dtype in DTYPES[dtypes]}


def gradients_of(params: Any, step: int = 0, first: float = 0.5) -> Any:
    """Fixed numbers for each leaf, larger with each step; `first` is in every leaf."""
    return jax.tree.map(
        lambda p: jnp.array(np.resize(np.array([first, -0.25, 2.0]) * (step + 1), np.shape(p)).astype(p.dtype)), params
    )


def run(row: str, params: Any, steps: int = 2) -> Iterator[tuple[Any, Any]]:
    """The carry and output of each jitted step."""
    carry = face(row).init(arrays(params))
    for i in range(steps):
        carry, output = face(row).jitted(carry, gradients_of(params, i))
        yield jax.tree.map(np.array, (carry, output))


def params_of(row: str, carry: Any) -> Any:
    return carry.params if row == "optimize_loss" else carry[0]


def types(tree: Any) -> Any:
    """The structure, shapes, dtypes and weak types of a tree, of arrays or of shapes."""
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def assert_close(got: Any, expected: Any) -> None:
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-7)


def check_types(row: str, params: Any) -> None:
    """Asserts that types stay from `init` on, and that updates have those of the gradients. Traces, runs nothing."""
    init, step, _ = face(row)
    carry = jax.eval_shape(init, arrays(params))
    gradients = gradients_of(params)
    after, output = jax.eval_shape(step, carry, gradients)
    assert types(after) == types(carry)
    if row != "optimize_loss":
        assert types(output) == types(gradients)


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@every_row_anew
def test_a_jitted_step_equals_one_without_jit(row: str) -> None:
    init, step, _ = face(row)
    step, carry = getattr(step, "__wrapped__", step), init(arrays(PARAMS))
    for i, expected in enumerate(run(row, PARAMS)):
        carry, output = step(carry, gradients_of(PARAMS, i))
        assert_close((carry, output), expected)


@every_row_anew
def test_a_scan_equals_a_loop(row: str) -> None:
    init, step, _ = face(row)
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(gradients_of(PARAMS, i) for i in range(3)))
    carry, outputs = jax.lax.scan(step, init(arrays(PARAMS)), batches)
    steps = list(run(row, PARAMS, steps=3))
    for i, (_, expected) in enumerate(steps):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], outputs), expected)
    assert_close(carry, steps[-1][0])


@every_row_anew
def test_a_vmapped_step_equals_single_ones(row: str) -> None:
    init, step, jitted = face(row)
    lanes = [(arrays(PARAMS), gradients_of(PARAMS, 0)), (gradients_of(PARAMS, 1), gradients_of(PARAMS, 2))]
    params, gradients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    batched = jax.jit(jax.vmap(lambda params, gradients: step(init(params), gradients)))(params, gradients)
    for i, (params, gradients) in enumerate(lanes):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], batched), jitted(init(params), gradients))


@every_row_anew
def test_a_step_under_cond_happens_where_it_is_chosen_and_else_not(row: str) -> None:
    init, step, jitted = face(row)
    gradients = gradients_of(PARAMS)

    @jax.jit
    def step_if(chosen: jax.Array, carry: Any) -> Any:
        return jax.lax.cond(chosen, lambda carry: step(carry, gradients)[0], lambda carry: carry, carry)

    assert_close(step_if(jnp.array(True), init(arrays(PARAMS))), jitted(init(arrays(PARAMS)), gradients)[0])
    chex.assert_trees_all_equal(step_if(jnp.array(False), init(arrays(PARAMS))), init(arrays(PARAMS)))


@every_row_anew
def test_the_gradient_through_two_steps_is_finite(row: str) -> None:
    """With a gradient of 0 for some elements of each leaf, and for all."""
    init, step, _ = face(row)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params: Any, gradients: Any) -> jax.Array:
        carry, _ = step(init(params), gradients)
        carry, _ = step(carry, gradients)
        return jnp.sum(jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(carry) if is_float(leaf)]))

    for gradients in (gradients_of(PARAMS, first=0.0), jax.tree.map(jnp.zeros_like, gradients_of(PARAMS))):
        result = gradient(arrays(PARAMS), gradients)
        chex.assert_tree_all_finite(result)
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(result))


@every_row
def test_a_donated_state_is_gone_and_the_next_step_goes_on(row: str) -> None:
    init, _, jitted = face(row)
    params = arrays(PARAMS)
    carry = init(params)
    for i in range(3):
        old, gradients = carry, gradients_of(PARAMS, i)
        carry, _ = jitted(old, gradients)
        # JAX from 0.11 on hands on, instead, what a step leaves as it is.
        pairs = zip(jax.tree.leaves(old), jax.tree.leaves(carry), strict=True)
        assert all(leaf.is_deleted() or np.array_equal(leaf, new) for leaf, new in pairs)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((carry, params, gradients)))


@every_row
def test_init_under_eval_shape_tells_what_init_gives(row: str) -> None:
    init = face(row).init
    assert types(jax.eval_shape(init, arrays(PARAMS))) == types(init(arrays(PARAMS)))


@every_row_anew
def test_four_steps_are_traced_once(row: str) -> None:
    init, step, _ = face(row)
    traces = 0

    @jax.jit
    def counted(carry: Any, gradients: Any) -> Any:
        nonlocal traces
        traces += 1
        return step(carry, gradients)

    carry = init(arrays(PARAMS))
    for i in range(4):
        carry, _ = counted(carry, gradients_of(PARAMS, i))
    assert traces == 1


@every_row
def test_a_step_transfers_nothing_from_or_to_the_host(row: str) -> None:
    init, _, jitted = face(row)
    carry, gradients = init(arrays(PARAMS)), gradients_of(PARAMS, 1)
    assert "callback" not in jitted.lower(carry, gradients).as_text()
    carry, _ = jitted(carry, gradients_of(PARAMS))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(jitted(carry, gradients))


@every_row
def test_types_stay_in_every_step(row: str) -> None:
    init, _, jitted = face(row)
    carry = init(arrays(PARAMS))
    expected = types(carry)
    for i in range(3):
        carry, _ = jitted(carry, gradients_of(PARAMS, i))
        assert types(carry) == expected


@every_row
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_stay(row: str, dtype: str) -> None:
    with enable_x64("float64" in dtype):
        check_types(row, cast(dtype))


@every_row
@pytest.mark.parametrize("tree", TREES)
def test_trees_stay(row: str, tree: str) -> None:
    check_types(row, TREES[tree])


@every_row_anew
def test_leaves_of_16_bits_follow_those_of_32(row: str) -> None:
    """To half a spacing for each of two updates and two sums, of numbers below 8: 4 * 4 * eps / 2."""
    narrow = {"kernel": KERNEL.astype(jnp.bfloat16), "scale": PARAMS["scale"].astype(jnp.float16)}
    (got, _), (expected, _) = (list(run(row, params))[-1] for params in (narrow, PARAMS))
    for name, leaf in params_of(row, got).items():
        tolerance = 8 * float(jnp.finfo(leaf.dtype).eps)
        np.testing.assert_allclose(leaf.astype(np.float32), params_of(row, expected)[name], rtol=0, atol=tolerance)


@every_row_anew
def test_an_empty_leaf_changes_nothing_for_the_others(row: str) -> None:
    (expected, _), (got, _) = (
        list(run(row, params))[-1] for params in (PARAMS, PARAMS | {"empty": np.zeros((0, 3), np.float32)})
    )
    kept = dict(params_of(row, got))
    assert kept.pop("empty").shape == (0, 3)
    assert_close(kept, params_of(row, expected))


@pytest.mark.parametrize(
    "row", ["noise", "multiply", "multiply_by_step", *(pytest.param(row, marks=pytest.mark.slow) for row in PIPELINES)]
)
def test_an_integer_leaf_is_left_unchanged(row: str) -> None:
    params = {"kernel": KERNEL, "table": np.arange(3, dtype=np.int32)}
    check_types(row, params)
    carry, output = list(run(row, params))[-1]
    if row in PIPELINES:
        np.testing.assert_array_equal(params_of(row, carry)["table"], params["table"])
    else:
        np.testing.assert_array_equal(output["table"], gradients_of(params, 1)["table"])


def spread(tree: Any, axis_type: AxisType) -> Any:
    """The tree on a mesh of eight devices, arrays cut along their first axis."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*["x", None][: leaf.ndim]))), tree
    )


@every_row_anew
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda axis: axis.name)
def test_eight_devices_equal_one(row: str, axis_type: AxisType) -> None:
    init, _, jitted = face(row)
    carry = init(spread(PARAMS, axis_type))
    for i, expected in enumerate(run(row, PARAMS)):
        carry, output = jitted(carry, spread(gradients_of(PARAMS, i), axis_type))
        assert_close((carry, output), expected)
        assert len(params_of(row, carry)["kernel"].sharding.device_set) == 8


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda axis: axis.name)
def test_the_state_of_optimize_loss_stays_where_init_puts_it(axis_type: AxisType) -> None:
    """Else the second step is compiled again."""
    init, _, jitted = face("optimize_loss")
    carry = init(spread(PARAMS, axis_type))
    before = jax.tree.map(lambda leaf: leaf.sharding, carry)
    carry, _ = jitted(carry, spread(gradients_of(PARAMS), axis_type))
    moved = [
        f"{jax.tree_util.keystr(path)} from {old} to {leaf.sharding}"
        for (path, leaf), old in zip(jax.tree.leaves_with_path(carry), jax.tree.leaves(before), strict=True)
        if not leaf.sharding.is_equivalent_to(old, leaf.ndim)
    ]
    assert not moved
