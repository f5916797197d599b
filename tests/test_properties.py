"""Laws that hold for all numbers: of the clips, of neutral settings, of names and order, of scale, of parted variables.

Each structure is compiled once; the numbers are drawn. Subnormal numbers are left out: XLA makes 0 of them on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import PROFILE

import optloss

FLOAT32, BFLOAT16, FLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
SHAPES = {"a": (), "b": (3,), "c": (2, 2)}
KEYS = hnp.arrays(np.uint32, 2)
# JAX's threads flush subnormals, which Hypothesis notices.
floats = functools.partial(st.floats, allow_subnormal=False)

UNITS = floats(-1, 1, width=32)
LARGE = floats(2**-10, 2**10, width=32) | floats(-(2**10), -(2**-10), width=32)  # of either sign, never 0


def trees(elements: st.SearchStrategy[float], dtype: Any = FLOAT32) -> st.SearchStrategy[dict[str, np.ndarray]]:
    """Dicts of arrays of `SHAPES`."""
    return st.fixed_dictionaries(
        {
            name: hnp.arrays(np.float64, shape, elements=elements).map(lambda leaf: leaf.astype(dtype))
            for name, shape in SHAPES.items()
        }
    )


@st.composite
def gradients_of_any_size(draw: Callable[..., Any], dtype: Any) -> dict[str, np.ndarray]:
    """Gradients from 1e-30 to 1e29, or as far as the dtype goes, each of a size of its own."""
    smallest, largest = (-6, 3) if dtype == FLOAT16 else (-30, 29)
    tree = draw(trees(UNITS, np.float64))
    sizes = draw(st.lists(st.integers(smallest, largest), min_size=3, max_size=3))
    scaled = {name: leaf * 10.0**size for size, (name, leaf) in zip(sizes, tree.items(), strict=True)}
    tiny = float(ml_dtypes.finfo(dtype).tiny)
    return {name: np.where(np.abs(leaf) < tiny, 0, leaf).astype(dtype) for name, leaf in scaled.items()}


def norm_of(tree: Any) -> float:
    """The norm in float64."""
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))))


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True):
        assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes()), f"{x} is not {y}"


def rounding(dtype: Any, count: int) -> tuple[float, float]:
    """By how much rounding to a dtype can lift a norm: relatively, and for elements near its smallest number."""
    info = ml_dtypes.finfo(dtype)
    return 4e-7 + float(info.eps) / 2, np.sqrt(count) * float(info.smallest_subnormal)


@functools.partial(jax.jit, static_argnums=0)
def clipped_by(face: str, limit: Any, gradients: Any) -> Any:
    """What a clip to `limit` leaves, alone and in the pipeline."""
    if face == "stage":
        return optloss.clip_by_global_norm(limit).update(gradients, optax.EmptyState())[0]
    pipeline = optloss.transformation(None, 1.0, "SGD", clip_gradients=limit)
    updates, _ = pipeline.update(gradients, pipeline.init(gradients), gradients)
    return jax.tree.map(jnp.negative, updates)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("face", ["stage", "pipeline"])
@settings(PROFILE, max_examples=60)
@given(st.data())
def test_a_clipped_norm_is_at_most_the_limit(face: str, dtype: Any, data: st.DataObject) -> None:
    gradients = data.draw(gradients_of_any_size(dtype))
    limit = float(np.float32(data.draw(floats(1, 10)) * 10.0 ** data.draw(st.integers(-30, 29))))
    clipped = clipped_by(face, np.float32(limit), gradients)
    before, after = norm_of(gradients), norm_of(clipped)
    relative, absolute = rounding(dtype, 8)
    assert after <= limit * (1 + relative) + absolute
    if limit * (1 + 1e-6) < before < limit * 1e37:  # not less either; a factor below 1e-38 is 0
        assert after >= limit * (1 - relative - 1e-6) - absolute
    if before < limit * (1 - 1e-6):
        assert_same_bits(clipped, gradients)


class Adaptive(NamedTuple):
    """Settings of the adaptive clip."""

    std_factor: float
    decay: float
    static_max_norm: float


@functools.partial(jax.jit, static_argnums=0)
def adaptively_clipped(global_step: bool, adaptive: Adaptive, gradients: jax.Array) -> jax.Array:
    """Each of a row of gradients, after those before it."""
    clip = optloss.adaptive_clipping_fn(*adaptive, global_step=global_step)

    def step(state: Any, gradient: jax.Array) -> Any:
        clipped, state = clip.update(gradient, state)
        return state, clipped

    return jax.lax.scan(step, clip.init(gradients[0]), gradients)[1]


def limits_of(adaptive: Adaptive, norms: np.ndarray, *, global_step: bool) -> Any:
    """The logarithms of TF1's limit and of the average that it clips to, by TF1's formula, in float64."""
    mean = square = 0.0
    for n, norm in enumerate(norms):
        decay = min(adaptive.decay, n / (n + 1)) if global_step else adaptive.decay
        value = np.log(norm + 1e-8)
        mean, square = decay * mean + (1 - decay) * value, decay * square + (1 - decay) * value**2
        yield mean + adaptive.std_factor * np.sqrt(max(1e-8, square - mean**2)), mean


@pytest.mark.parametrize("global_step", [False, True])
@settings(PROFILE, max_examples=60)
@given(
    gradients=st.lists(
        st.tuples(hnp.arrays(np.float64, 3, elements=UNITS), st.integers(-30, 29)), min_size=6, max_size=6
    ),
    adaptive=st.builds(Adaptive, floats(0, 4), floats(0, 0.996), floats(1, 10)),
    size=st.integers(-30, 29),
)
def test_an_adaptively_clipped_norm_is_at_most_the_limit_of_the_paper(
    global_step: bool, gradients: Any, adaptive: Adaptive, size: int
) -> None:
    adaptive = Adaptive(*(float(np.float32(x)) for x in (adaptive[0], adaptive[1], adaptive[2] * 10.0**size)))
    rows = np.stack([np.where(np.abs(row * 10.0**size) < 1e-37, 0, row * 10.0**size) for row, size in gradients])
    rows = rows.astype(np.float32)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    clipped = np.asarray(adaptively_clipped(global_step, Adaptive(*map(np.float32, adaptive)), rows))
    limits = limits_of(adaptive, norms, global_step=global_step)
    for row, after, norm, (limit, average) in zip(rows, clipped, norms, limits, strict=True):
        after_norm = float(np.linalg.norm(after.astype(np.float64)))
        # Of the logarithm, in float32: its average may lie far from 0.
        slack = 1e-4 * (1 + abs(limit) + abs(average))
        assert after_norm <= np.exp(min(limit + slack, 700))
        assert after_norm <= adaptive.static_max_norm * (1 + 1e-6)
        if norm < np.exp(min(limit - slack, 700)) and norm < adaptive.static_max_norm * (1 - 1e-6):
            assert_same_bits(after, row)
        if norm > np.exp(min(limit + slack, 700)):
            assert after_norm <= np.exp(average + slack)


def compiled(structure: Callable[[Any], Any] = dict, **changes: Any) -> Callable[..., dict[str, jax.Array]]:
    """A step of Adam with noise, jitted: from dicts of parameters and gradients to new parameters by their names."""
    chosen: dict[str, Any] = {"learning_rate": 0.1, "optimizer": "Adam", "gradient_noise_scale": 0.01, **changes}

    @jax.jit
    def run(params: Any, gradients: Any, key: jax.Array) -> dict[str, jax.Array]:
        pipeline = optloss.transformation(0, **chosen, key=key)
        params, gradients = structure(params), structure(gradients)
        updates, _ = pipeline.update(gradients, pipeline.init(params), params)
        params = optax.apply_updates(params, updates)
        return dict(zip(optloss.parameter_names(params), jax.tree.leaves(params), strict=True))

    return run


PLAIN, CLIPPED, SILENT = compiled(), compiled(clip_gradients=1.0), compiled(gradient_noise_scale=None)
NEUTRAL = {
    "a multiplier of 1": (CLIPPED, compiled(clip_gradients=1.0, gradient_multipliers={"**": 1})),
    "arrays of 1": (CLIPPED, compiled(clip_gradients=1.0, gradient_multipliers={"b": np.ones(3), "*": np.ones(())})),
    "a function to 1": (CLIPPED, compiled(clip_gradients=1.0, gradient_multipliers={"**": lambda step: 1.0})),
    "noise of scale 0": (SILENT, compiled(gradient_noise_scale=0)),
    "noise of an array of 0": (SILENT, compiled(gradient_noise_scale=np.zeros(()))),
    "noise of a function to 0": (SILENT, compiled(gradient_noise_scale=lambda step: 0.0 * step)),
}


@pytest.mark.parametrize(("without", "neutral"), NEUTRAL.values(), ids=NEUTRAL)
@settings(PROFILE, max_examples=30)
@given(params=trees(LARGE), gradients=trees(LARGE), key=KEYS)
def test_a_neutral_setting_changes_no_bit(
    without: Callable[..., Any], neutral: Callable[..., Any], params: Any, gradients: Any, key: Any
) -> None:
    assert_same_bits(neutral(params, gradients, key), without(params, gradients, key))


class Parts(NamedTuple):
    """The parameters of `SHAPES`, not in the order in which a dict has them."""

    c: Any
    a: Any
    b: Any


# Where there is a clip, all share a norm, and without `reproducible` its rounding hangs on the order.
STRUCTURES = {
    "another order of keys": (CLIPPED, compiled(lambda tree: dict(reversed(tree.items())), clip_gradients=1.0)),
    "a NamedTuple": (PLAIN, compiled(lambda tree: Parts(**tree))),
    "a NamedTuple and a clip": (
        compiled(clip_gradients=1.0, reproducible=True),
        compiled(lambda tree: Parts(**tree), clip_gradients=1.0, reproducible=True),
    ),
    "a list": (
        compiled(lambda tree: dict(zip("012", tree.values(), strict=True)), clip_gradients=1.0),
        compiled(lambda tree: list(tree.values()), clip_gradients=1.0),
    ),
    "others besides": (
        PLAIN,
        compiled(lambda tree: {**tree, "A": tree["b"], "bb": {"a": tree["a"], "b": tree["c"]}, "zz": [tree["a"]]}),
    ),
}


@pytest.mark.parametrize(("plain", "other"), STRUCTURES.values(), ids=STRUCTURES)
@settings(PROFILE, max_examples=30)
@given(params=trees(LARGE), gradients=trees(LARGE), key=KEYS)
def test_a_parameter_moves_by_its_name_whatever_holds_it_and_stands_beside_it(
    plain: Callable[..., Any], other: Callable[..., Any], params: Any, gradients: Any, key: Any
) -> None:
    expected, found = plain(params, gradients, key), other(params, gradients, key)
    assert_same_bits({name: found[name] for name in expected}, expected)


@settings(PROFILE, max_examples=60)
@given(name=st.text(max_size=20).filter(lambda name: name != "w"), gradient=hnp.arrays(np.float32, 3, elements=UNITS))
def test_noise_of_a_parameter_hangs_on_no_name_beside_it(name: str, gradient: Any) -> None:
    noise = optloss.add_gradient_noise(0.1, key=7)
    alone, beside = {"w": gradient}, {name: gradient, "w": gradient}
    expected, _ = noise.update(alone, noise.init(alone))
    found, _ = noise.update(beside, noise.init(beside))
    assert_same_bits(found["w"], expected["w"])
    assert not np.array_equal(found[name], found["w"])


@functools.partial(jax.jit, static_argnums=0)
def trained(optimizer: Any, scale: Any, limit: Any, batches: Any) -> Any:
    """Parameters that start from 0 after a step on each batch of `scale` times a loss that is linear in them."""

    def loss(params: Any, batch: Any) -> jax.Array:
        return scale * sum(jnp.vdot(params[name], batch[name]) for name in SHAPES)

    train = optloss.optimize_loss(loss, 0, 0.1, optimizer, clip_gradients=limit)
    state = train.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    for batch in batches:
        state, _ = train.update(state, batch)
    return state.params


def adam_without_epsilon(rate: Any) -> optax.GradientTransformation:
    return optloss.adam(rate, epsilon=0.0)


@pytest.mark.parametrize(("optimizer", "scales"), [("SGD", True), ("Momentum", True), (adam_without_epsilon, False)])
@settings(PROFILE, max_examples=30)
@given(batches=st.lists(trees(LARGE), min_size=2, max_size=2), power=st.integers(-20, 20), limit=floats(2**-5, 2**12))
def test_a_power_of_2_on_loss_and_limit_scales_an_update_to_the_bit_and_leaves_that_of_adam(
    optimizer: Any, scales: bool, batches: Any, power: int, limit: float
) -> None:
    scale = 2.0**power
    plain, scaled = trained(optimizer, 1.0, limit, batches), trained(optimizer, scale, limit * scale, batches)
    expected = {name: leaf * np.float32(scale if scales else 1) for name, leaf in plain.items()}
    assert_same_bits(scaled, expected)


def parted(params: Any, x: jax.Array) -> jax.Array:
    """A loss of which each parameter has a term of its own."""
    return jnp.sum((params["a"] - x) ** 2) + jnp.sum(jnp.cos(params["b"] * x)) + jnp.sum(params["c"] ** 2 * x)


FACTORS = {"a": 0.3, "b": lambda step: 0.7**step, "c": np.array([1.0, 0.1])}
of_all = optloss.optimize_loss(parted, 0, 0.1, "SGD", gradient_multipliers=FACTORS)
of_b = optloss.optimize_loss(
    parted, 0, 0.1, "SGD", gradient_multipliers=FACTORS, variables="b", name="b", increment_global_step=False
)
of_rest = optloss.optimize_loss(parted, 0, 0.1, "SGD", gradient_multipliers=FACTORS, variables=["a", "c"], name="rest")


@settings(PROFILE, max_examples=20)
@given(params=trees(UNITS), xs=st.lists(UNITS.map(np.float32), min_size=3, max_size=3))
def test_variables_parted_between_two_ops_move_as_those_of_one(params: Any, xs: Any) -> None:
    one, two = of_all.init(params), of_rest.init(of_b.init(params))
    for x in xs:
        one, _ = of_all.update(one, x)
        two, _ = of_b.update(two, x)
        two, _ = of_rest.update(two, x)
    assert_same_bits(two.params, one.params)
    assert int(two.global_step) == int(one.global_step) == 3
