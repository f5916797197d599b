"""What the other tests would not see if one operator or number of the source were another: exact draws and bounds."""

import functools
import hashlib
import math
import re
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import enable_x64

import optloss
from optloss._clipping import clip_stage
from optloss._noise import _mix, scoped_key

KEY = np.uint32([3, 5])  # the data of a key
NAME = np.frombuffer(hashlib.blake2b(b"w", digest_size=8).digest(), "<u4")


def mixed(x: int) -> int:
    """Wellons's lowbias32, in Python's integers."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def bits_of(low: int, high: int, words: list[int]) -> int:
    """The random bits of one element: lowbias32's first round, with a word of the key at each, and a last square."""
    x = (low + words[0]) % 2**32
    x = ((x ^ x >> 16) * 0x7FEB352D + words[1] + high * 0x9E3779B1) % 2**32
    y = ((x ^ x >> 15) + words[0]) % 2**32
    y = (y * y + x) % 2**32
    return y ^ y >> 16


def words_of(step: int, name: np.ndarray) -> list[int]:
    """The two words from which the elements of a parameter are drawn at a step."""
    words = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(KEY, impl="threefry2x32"), step))
    return [mixed(int(word) ^ int(part)) for word, part in zip(words, name, strict=True)]


def draw(stage: Any, step: int, shape: tuple[int, ...], **arguments: Any) -> np.ndarray:
    zeros = {"w": jnp.zeros(shape)}
    return np.asarray(stage.update(zeros, stage.init(zeros)._replace(step=jnp.int32(step)), **arguments)[0]["w"])


@pytest.mark.parametrize("step", [0, 7])
def test_the_draw_of_a_key_a_step_and_a_name_is_the_same_in_every_release(step: int) -> None:
    words, inside = words_of(step, NAME), NormalDist().cdf(2.0) - NormalDist().cdf(-2.0)
    signed = [(bits_of(i, 0, words) + 2**31) % 2**32 - 2**31 for i in range(10)]
    expected = [0.5 * NormalDist().inv_cdf(0.5 + inside * ((bits >> 8) + 0.5) / 2**24) for bits in signed]
    got = draw(optloss.add_gradient_noise(0.5, KEY), step, (5, 1, 2))
    np.testing.assert_allclose(got.ravel(), expected, rtol=0, atol=1e-6)


def test_the_high_word_of_an_index_has_a_part_in_its_bits() -> None:
    words, at = [0x12345678, 0x9ABCDEF0], [(0, 0), (5, 0), (5, 1), (2**32 - 1, 7)]
    low, high = (jnp.asarray(word, jnp.uint32) for word in zip(*at, strict=True))
    assert _mix(low, high, jnp.asarray(words, jnp.uint32)).tolist() == [bits_of(*place, words) for place in at]


def test_threefry_draws_what_jax_draws_from_the_key_folded_with_step_and_name() -> None:
    key = jax.random.wrap_key_data(KEY, impl="threefry2x32")
    key = functools.reduce(jax.random.fold_in, [7, *NAME.tolist()], key)
    expected = 0.5 * jax.random.truncated_normal(key, -2.0, 2.0, (3, 2))
    got = draw(optloss.add_gradient_noise(0.5, KEY, generator="threefry"), 7, (3, 2))
    np.testing.assert_array_equal(got, expected)


def test_a_scale_is_called_with_the_pipelines_step_and_the_draw_is_that_of_its_own() -> None:
    stage = optloss.add_gradient_noise(lambda step: 1.0 * step, KEY)
    one = draw(optloss.add_gradient_noise(1.0, KEY), 2, (4,))
    np.testing.assert_allclose(draw(stage, 2, (4,)), 2 * one, rtol=1e-6)
    np.testing.assert_allclose(draw(stage, 2, (4,), global_step=jnp.int32(8)), 8 * one, rtol=1e-6)


def test_a_key_becomes_two_words() -> None:
    rows = [(2**40 + 5, 2**8, 5), (2**64 - 1, 2**32 - 1, 2**32 - 1), (np.int64(2**33), 2, 0), (jnp.int32(5), 0, 5)]
    for key, *data in [*rows, (KEY, 3, 5)]:
        assert optloss.add_gradient_noise(1.0, key).init({}).key.tolist() == data


def test_a_scoped_key_is_folded_with_both_words_of_the_scope() -> None:
    key = functools.reduce(jax.random.fold_in, NAME.tolist(), jax.random.key(0))
    np.testing.assert_array_equal(scoped_key(0, "w"), jax.random.key_data(key))


NO_KEYS = [True, 0.5, "0", None, np.float32(1), np.arange(2), np.zeros(2, np.int32), np.zeros(3, np.uint32)]


@pytest.mark.parametrize("key", [*NO_KEYS, np.zeros((2, 2), np.uint32), jax.ShapeDtypeStruct((2,), jnp.float32)])
def test_what_is_no_key_is_a_type_error(key: Any) -> None:
    with pytest.raises(TypeError, match="^key: got"):
        optloss.add_gradient_noise(1.0, key)


def test_many_typed_keys_are_a_type_error_and_a_traced_seed_is_none() -> None:
    with pytest.raises(TypeError, match="^key: got"):
        optloss.add_gradient_noise(1.0, jax.random.split(jax.random.key(0)))
    seeded = jax.jit(lambda seed: optloss.add_gradient_noise(1.0, seed).init({}).key)(jnp.int32(3))
    assert seeded.tolist() == [0, 3]


@pytest.mark.parametrize("scale", [lambda step: jnp.ones(2), lambda step: jnp.bool_(True), lambda step: (1.0,)])
def test_a_scale_that_returns_no_number_is_a_value_error(scale: Any) -> None:
    with pytest.raises(ValueError, match="^scale: the function returns"):
        optloss.add_gradient_noise(scale, 0)


# The largest update at a rate of 1 that norms up to 1e15 can make, worked out by hand from each rule.
LARGEST: list[tuple[Callable[[Any], Any], float]] = [
    (lambda rate: optloss.momentum(rate, 0.9), 2 * 10 * 1e15),
    (lambda rate: optloss.momentum(rate, 1.0), 2 * 2.0**31 * 1e15),
    (lambda rate: optloss.momentum(rate, 1 - 2.0**-40), 2 * 2.0**31 * 1e15),
    (lambda rate: optloss.adagrad(rate), 1e15 / math.sqrt(0.1)),
    (lambda rate: optloss.adagrad(rate, 1e29), 1 + 1e15 / math.sqrt(1e29)),
    (lambda rate: optloss.rmsprop(rate), 1e15 / 1e-5),
    (lambda rate: optloss.rmsprop(rate, momentum=0.5, epsilon=1e-4), 2 * 1e15 / 1e-2),
    (lambda rate: optloss.rmsprop(rate, momentum=1.0), 2.0**31 * 1e15 / 1e-5),
    # spread = 0.001 * (1 - 0.81 / 0.999) / 0.1**2 = 0.0189189; 1 / sqrt(spread) = 7.27029.
    (lambda rate: optloss.adam(rate), (7.27029 + 1e-11) / 0.1),
    (lambda rate: optloss.adam(rate, epsilon=1e-20), (7.27029 + 10) / 0.1),
    # spread = 0.25 * (1 - 0.25 / 0.75) / 0.5**2 = 2 / 3.
    (lambda rate: optloss.adam(rate, 0.5, 0.75), math.sqrt(1.5) / 0.5),
]


@pytest.mark.parametrize(("builder", "largest"), LARGEST)
def test_a_step_is_safe_up_to_an_update_of_1e30(builder: Callable[[Any], Any], largest: float) -> None:
    def is_safe(rate: float, norm: float) -> bool:
        return bool(builder(rate).is_safe(jnp.float32(norm), {"w": jnp.zeros(1)}))

    rate = 1e30 / largest
    assert is_safe(0.999 * rate, 1e15)
    assert not is_safe(1.001 * rate, 0.0)
    assert not is_safe(0.1, 1.001e15)
    assert not is_safe(0.1, math.nan)


def test_an_optimizer_whose_updates_have_no_bound_is_not_guarded() -> None:
    unbounded = [optloss.momentum(0.1, 1.01), optloss.adagrad(0.1, 1e30), optloss.rmsprop(0.1, momentum=1.01)]
    unbounded += [optloss.adam(0.1, *betas) for betas in ((0.9, 0.81), (0.9, 0.5), (0.5, 0.25))]
    unbounded += [optloss.adam(0.1, epsilon=epsilon) for epsilon in (0, 1e-30)]
    for optimizer in (*unbounded, optloss.ftrl(0.1), optloss.sgd(lambda step: 0.1)):
        assert not hasattr(optimizer, "is_safe")


def test_a_step_of_sgd_is_safe_up_to_rate_times_norm_of_1e30() -> None:
    for rate, norm, safe in ((0.1, 9.99e30, True), (0.1, 1.001e31, False), (1.0, 1e30, True)):
        assert bool(optloss.sgd(rate).is_safe(jnp.float32(norm), {"w": jnp.zeros(1)})) == safe


GUARDED = {
    "sgd": lambda: optloss.sgd(0.1),
    "momentum": lambda: optloss.momentum(0.1, 0.9),
    "nesterov": lambda: optloss.momentum(0.1, 0.9, use_nesterov=True),
    "adagrad": lambda: optloss.adagrad(0.1),
    "adam": lambda: optloss.adam(0.1),
    "rmsprop": lambda: optloss.rmsprop(0.1),
    "rmsprop_all": lambda: optloss.rmsprop(0.1, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", GUARDED)
def test_a_guarded_update_is_minus_zero_and_the_old_state_where_it_is_told_to_wait(name: str) -> None:
    optimizer, gradients = GUARDED[name](), {"w": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(3.0)}
    _, state = optimizer.update(gradients, optimizer.init(gradients))
    waiting = {"w": jnp.asarray([math.nan, -1.0]), "b": jnp.asarray(math.inf)}
    updates, after = optimizer.guarded_update(jnp.asarray(False), waiting, state, gradients)
    assert all(np.all((leaf == 0) & np.signbit(leaf)) for leaf in map(np.asarray, jax.tree.leaves(updates)))
    went = optimizer.guarded_update(jnp.asarray(True), gradients, state, gradients)
    for got, expected in ((after, state), (went, optimizer.update(gradients, state))):
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def ftrl_step(w: float, g: float, n: float, z: float, p: float, l1: float, l2: float, s: float) -> Any:
    """One step at a rate of 0.5."""
    z += g + 2 * s * w - ((n + g * g) ** -p - n**-p) / 0.5 * w
    n += g * g
    return (0.0 if abs(z) <= l1 else (math.copysign(l1, z) - z) / (n**-p / 0.5 + 2 * l2)), n, z


@pytest.mark.parametrize(
    "settings", [(-0.5, 0.1, 0, 0, 0), (-0.7, 0.2, 0.3, 0.4, 0.6), (0, 0.1, 0.3, 0.4, 0.6), (-0.5, 4.0, 0.3, 0.4, 0.6)]
)
def test_ftrl_takes_the_steps_of_its_formula(settings: Any) -> None:
    power, start, *rest = settings
    optimizer = optloss.ftrl(0.5, *settings)
    params = {"w": jnp.asarray([1.5, -2.0, 0.1])}
    state, rows = optimizer.init(params), [(w, start, 0.0) for w in (1.5, -2.0, 0.1)]
    for gradient in ([0.5, -1.0, 0.0], [-2.0, 0.25, 0.01], [1.0, 1.0, 1.0]):
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        rows = [ftrl_step(w, g, n, z, power, *rest) for (w, n, z), g in zip(rows, gradient, strict=True)]
        expected = np.transpose(rows)
        np.testing.assert_allclose(params["w"], expected[0], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(state.accumulator["w"], expected[1], rtol=1e-6)
        np.testing.assert_allclose(state.linear["w"], expected[2], rtol=2e-5, atol=1e-6)


def test_adam_takes_the_steps_of_its_formula() -> None:
    optimizer, m, v = optloss.adam(0.5, 0.6, 0.7, 0.1), 0.0, 0.0
    state = optimizer.init({"w": jnp.ones(())})
    for t, g in enumerate([2.0, -1.0, 0.5], 1):
        updates, state = optimizer.update({"w": jnp.asarray(g)}, state)
        m, v = 0.6 * m + 0.4 * g, 0.7 * v + 0.3 * g * g
        expected = -0.5 * math.sqrt(1 - 0.7**t) / (1 - 0.6**t) * m / (math.sqrt(v) + 0.1)
        got = updates["w"], state.beta1_power, state.beta2_power
        np.testing.assert_allclose(got, (expected, 0.6 ** (t + 1), 0.7 ** (t + 1)), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop_takes_the_steps_of_its_formula(momentum: float, centered: bool) -> None:
    optimizer = optloss.rmsprop(0.5, 0.7, momentum, 0.1, centered)
    ms, mg, mom = 1.0, 0.0, 0.0
    state = optimizer.init({"w": jnp.ones(())})
    assert (state.momentum is None, state.mean_gradient is None) == (momentum == 0, not centered)
    for g in [2.0, -1.0, 0.5]:
        updates, state = optimizer.update({"w": jnp.asarray(g)}, state)
        ms, mg = 0.7 * ms + 0.3 * g * g, 0.7 * mg + 0.3 * g
        mom = momentum * mom + 0.5 * g / math.sqrt(ms - centered * mg * mg + 0.1)
        np.testing.assert_allclose(updates["w"], -mom, rtol=1e-5)


def test_a_scheduled_rate_counts_its_steps_and_keeps_the_optimizers_state() -> None:
    optimizer = optloss.momentum(lambda step: 0.5**step, 0.5)
    state, got = optimizer.init({"w": jnp.ones(())}), []
    for _ in range(3):
        updates, state = optimizer.update({"w": jnp.ones(())}, state)
        got.append(float(updates["w"]))
    assert got == [-1.0, -0.75, -0.4375]  # accumulators 1, 1.5, 1.75
    assert int(state.step) == 3


def test_an_optimizer_of_float64_slots_keeps_their_digits_under_float32_gradients() -> None:
    with enable_x64(True):
        optimizer = optloss.rmsprop(0.5, 0.7)
        _, state = optimizer.update({"w": jnp.float32(2)}, optimizer.init({"w": jnp.float64(0)}))
        np.testing.assert_allclose(state.mean_square["w"], 0.7 + 0.3 * 4, rtol=1e-14)


def test_an_optimizer_of_no_parameters_has_no_updates() -> None:
    for optimizer in (optloss.momentum(0.1, 0.9), optloss.adam(0.1), optloss.rmsprop(0.1)):
        assert optimizer.update({}, optimizer.init({}))[0] == {}


def test_the_factors_of_a_multiplier_are_scalars_arrays_or_none() -> None:
    """At its own step of 4, and at the pipeline's of 6."""
    stage = optloss.multiply_gradients({"row": np.arange(1, 4), "step": lambda step: 1.0 * step, "n": 2, "half": 3})
    tree = {"row": jnp.ones((2, 3)), "step": jnp.ones(2), "n": jnp.ones(2, int), "rest": jnp.ones(1)}
    tree["half"] = jnp.ones(2, jnp.bfloat16)
    state = stage.init(tree)._replace(step=jnp.int32(4))
    for step, expected in ((None, 4.0), (jnp.int32(6), 6.0)):
        half, n, rest, row, by_step = stage.factors(tree, state, step)
        assert (n, rest) == (None, None)
        assert (half.shape, half.dtype, by_step.shape, float(by_step)) == ((), jnp.float32, (), expected)
        assert row.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert len(stage.factors({"row": tree["row"]}, state, None)) == 1  # what is not trained is not there
    multiplied, state = stage.update(tree, state)
    assert (int(state.step), multiplied["n"].tolist(), multiplied["half"].dtype) == (5, [1, 1], jnp.bfloat16)
    assert optloss.multiply_gradients({"row": 2.0}).init(tree).step is None


@pytest.mark.parametrize(
    "factor",
    [
        None,
        True,
        "2",
        1j,
        math.nan,
        np.float32([1, math.inf]),
        np.array([1j]),
        np.array([True]),
        lambda: 1.0,
        lambda _: "",
    ],
)
def test_what_is_no_factor_is_an_error_that_names_it(factor: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^gradient_multipliers\['w'\]: "):
        optloss.multiply_gradients({"w": factor})


@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 2, 3), (4, 2, 3)])
def test_a_factor_that_would_widen_the_gradient_is_a_value_error(shape: tuple[int, ...]) -> None:
    for factor in (np.ones(shape), lambda step: jnp.ones(shape)):
        with pytest.raises(ValueError, match=r"^gradient_multipliers\['w'\]: got shape"):
            optloss.multiply_gradients({"w": factor}).init({"w": jnp.ones((2, 3))})


def test_a_traced_factor_is_taken_as_it_is() -> None:
    def multiplied(factor: jax.Array) -> jax.Array:
        stage = optloss.multiply_gradients({"w": factor})
        return stage.update({"w": jnp.ones(2)}, stage.init({"w": jnp.ones(2)}))[0]["w"]

    assert jax.jit(multiplied)(jnp.asarray([2.0, 3.0])).tolist() == [2.0, 3.0]


def test_an_adaptive_clip_keeps_its_step_limit_and_averages() -> None:
    """Logarithms of 0 and 2 at a decay of min(0.75, n / (n + 1)); norms of 0, NaN and infinity do not count."""
    clip = optloss.adaptive_clipping_fn(1.5, 0.75, 3.0, True, True, 1e-8, skip_zero_norm=True)
    state = clip.init({})
    assert jax.tree.map(float, state) == (0.0, 0.0, 0.0, 0.0)
    for norm in (1.0, 0.0, math.exp(2), math.nan, math.inf):
        _, state = clip.factor(jnp.float32(norm), state, None)
    # mean = 1, variance = 0.5 * (0 + 0.5 * 2**2) = 1, limit = exp(1 + 1.5): nothing is clipped but to 3.
    np.testing.assert_allclose(jax.tree.leaves(state), (1, 1, 2, math.exp(2.5)), rtol=1e-6)
    # At the pipeline's step of 1: mean = 3, variance = 0.5 * (1 + 0.5 * 4**2) = 4.5; 9 and 4.5 at its own step.
    factor, after = clip.factor(jnp.exp(5.0), state, jnp.int32(1))
    np.testing.assert_allclose(jax.tree.leaves(after), (3, 4.5, 3, math.exp(3 + 1.5 * math.sqrt(4.5))), rtol=1e-5)
    np.testing.assert_allclose(factor, 3 / math.exp(5), rtol=1e-5)


def test_an_adaptive_clip_takes_a_norm_down_to_the_average() -> None:
    """The mean is 1, the variance 0.5 * 0.5 * 2**2 = 1, the limit exp(1.5), the norm exp(2)."""
    clip = optloss.adaptive_clipping_fn(0.5, 0.5, 1e9)
    factor, state = clip.factor(jnp.exp(2.0), clip.init({}), jnp.int32(0))
    np.testing.assert_allclose(factor, math.exp(1 - 2), rtol=1e-6)
    assert (state.step, state.max_norm) == (None, None)


WARNINGS = [
    (lambda: optloss.clip_by_global_norm(3), "clip to norm 3", ""),
    (lambda: optloss.clip_by_global_norm(0), "clip to norm 0", "a limit of 0"),
    (lambda: optloss.clip_by_global_norm(1), "clip to norm 1", ""),
    (lambda: optloss.clip_by_global_norm(math.inf), "clip to norm inf", "a limit of infinity"),
    # sqrt(0.64 / 0.36) = 1.3333
    (lambda: optloss.adaptive_clipping_fn(1.33, 0.64), "adaptive clip", ""),
    (lambda: optloss.adaptive_clipping_fn(1.34, 0.64), "adaptive clip", "std_factor=1.34 is .* = 1.33, .* clips.$"),
    (lambda: optloss.adaptive_clipping_fn(1.34, 0.64, 1.0), "adaptive clip", "std_factor=1.34 .* but to"),
    (lambda: optloss.adaptive_clipping_fn(0.0, 0.0), "adaptive clip", ""),
    (lambda: optloss.adaptive_clipping_fn(2.0, 1.0), "adaptive clip", "decay=1 without"),
    (lambda: optloss.adaptive_clipping_fn(9.0, 1.0, global_step=True), "adaptive clip", ""),
]  # fmt: skip


@pytest.mark.parametrize(("builder", "description", "warning"), WARNINGS)
def test_a_clip_says_what_it_is_and_why_it_cannot_do_that(builder: Any, description: str, warning: str) -> None:
    clip = builder()
    assert clip.description == description
    assert re.match(warning or "$", clip.warning)


def test_a_clip_to_traced_settings_says_nothing_of_them() -> None:
    said = []

    def build(x: jax.Array) -> jax.Array:
        adaptive = optloss.adaptive_clipping_fn(x), optloss.adaptive_clipping_fn(9.0, decay=x)
        said.extend((clip.description, clip.warning) for clip in (optloss.clip_by_global_norm(x), *adaptive))
        return clip_stage(x).update({"w": jnp.ones(4)}, optax.EmptyState())[0]["w"]

    assert jax.jit(build)(jnp.float32(1)).tolist() == [0.5] * 4
    assert said == [("clip to a traced norm", ""), ("adaptive clip", ""), ("adaptive clip", "")]


def test_a_clip_that_was_not_called_is_a_type_error() -> None:
    for function in (optloss.adaptive_clipping_fn, optloss.clip_by_global_norm):
        with pytest.raises(TypeError, match="^clip_gradients: got the function .* itself"):
            clip_stage(function)


def test_a_clip_of_pairs_keeps_the_dtype_of_each_gradient() -> None:
    stage = clip_stage(lambda pairs: [(2 * g.astype(jnp.float32), p) for g, p in pairs])
    gradients = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(())}
    clipped, state = stage.update(gradients, stage.init(gradients), gradients)
    assert (clipped["a"].dtype, clipped["b"].dtype, state) == (jnp.bfloat16, jnp.float32, optax.EmptyState())
    assert (clipped["a"].tolist(), float(clipped["b"])) == ([2.0, 2.0], 2.0)


OUT_OF_BOUNDS: list[tuple[str, Callable[[], Any]]] = [
    ("scale", lambda: optloss.add_gradient_noise(-0.5, 0)),
    ("key", lambda: optloss.add_gradient_noise(0.5, np.array(-1))),
    ("key", lambda: optloss.add_gradient_noise(0.5, 2**64)),
    ("learning_rate", lambda: optloss.sgd(-0.5)),
    ("beta1", lambda: optloss.adam(0.1, -0.5)),
    ("beta2", lambda: optloss.adam(0.1, 0.9, -0.5)),
    ("beta2", lambda: optloss.adam(0.1, 0.9, 1)),
    ("decay", lambda: optloss.rmsprop(0.1, -0.5)),
    ("momentum", lambda: optloss.rmsprop(0.1, momentum=-0.5)),
    ("epsilon", lambda: optloss.rmsprop(0.1, epsilon=0)),
    ("clip_norm", lambda: optloss.clip_by_global_norm(-0.5)),
    ("std_factor", lambda: optloss.adaptive_clipping_fn(-0.5)),
    ("decay", lambda: optloss.adaptive_clipping_fn(decay=-0.5)),
]


@pytest.mark.parametrize(("argument", "builder"), OUT_OF_BOUNDS)
def test_a_setting_just_out_of_its_bounds_is_a_value_error(argument: str, builder: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        builder()


TRACED: list[Callable[[Any], Any]] = [
    lambda x: optloss.momentum(0.1, x),
    lambda x: optloss.adagrad(0.1, x),
    lambda x: optloss.adam(0.1, x),
    lambda x: optloss.adam(0.1, 0.9, x),
    lambda x: optloss.adam(0.1, epsilon=x),
    lambda x: optloss.rmsprop(0.1, x),
    lambda x: optloss.rmsprop(0.1, momentum=x),
    lambda x: optloss.rmsprop(0.1, epsilon=x),
    lambda x: optloss.ftrl(x),
    lambda x: optloss.ftrl(0.1, l1_regularization_strength=x),
]


@pytest.mark.parametrize("builder", TRACED)
def test_an_optimizer_with_a_traced_setting_takes_the_step_of_a_number(builder: Callable[[Any], Any]) -> None:
    params, gradients = {"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([0.5, -3.0])}

    def step(x: Any) -> Any:
        optimizer = builder(x)
        return optimizer.update(gradients, optimizer.init(params), params)[0]["w"]

    np.testing.assert_allclose(jax.jit(step)(jnp.float32(0.5)), step(0.5), rtol=1e-5)


def test_noise_keeps_a_key_of_its_own_that_can_be_donated() -> None:
    key = jnp.asarray(KEY)
    assert optloss.add_gradient_noise(0.5, key).init({}).key is not key


def test_a_norm_at_the_adaptive_limit_is_clipped_to_the_average() -> None:
    """A decay of 1 leaves the averages at -1 and 1: the limit is exp(-1 + 1), which is the norm."""
    clip = optloss.adaptive_clipping_fn(1.0, 1.0, epsilon=1e-30)
    state = clip.init({})._replace(mean=jnp.float32(-1), variance=jnp.float32(1))
    np.testing.assert_allclose(clip.factor(jnp.float32(1), state, None)[0], math.exp(-1), rtol=1e-6)


def test_gradients_of_0_stay_0_under_a_clip_to_0_and_under_ftrl_from_0() -> None:
    zeros = {"w": jnp.zeros(2)}
    assert optloss.clip_by_global_norm(0).update(zeros, optax.EmptyState())[0]["w"].tolist() == [0.0, 0.0]
    optimizer = optloss.ftrl(0.5, initial_accumulator_value=0)
    assert optimizer.update(zeros, optimizer.init(zeros), {"w": jnp.ones(2)})[0]["w"].tolist() == [-1.0, -1.0]


def test_an_update_takes_its_arguments_by_name_and_no_step_by_place() -> None:
    tree, noise = {"w": jnp.ones(3)}, optloss.add_gradient_noise(0.5, 0)
    for stage in (noise, optloss.multiply_gradients({"w": 0.5}), optloss.clip_by_global_norm(0.5), optloss.sgd(0.5)):
        state = stage.init(tree)
        by_name = stage.update(updates=tree, state=state, params=tree)
        jax.tree.map(np.testing.assert_array_equal, by_name, stage.update(tree, state, tree))
        with pytest.raises(TypeError, match="positional"):
            stage.update(tree, state, tree, jnp.int32(1))
