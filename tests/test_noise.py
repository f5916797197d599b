"""Gradient noise: its distribution against the recorded one, and what a draw hangs on."""

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import read_golden

import optloss
from optloss._noise import _quantile
from optloss._noise import indices as indices_of

SAMPLES = 1_000_000
GOLDEN = read_golden("noise.json")
THEORY = GOLDEN["theory_scale_1"]


def draw(names: list[str], shape: Any = (SAMPLES,), scale: Any = 1.0, key: Any = 0, steps: int = 1) -> list[Any]:
    """The noise of the named parameters at each step, on zero gradients."""
    stage = optloss.add_gradient_noise(scale, key)
    zeros = {name: jnp.zeros(shape) for name in names}
    state, draws = stage.init(zeros), []
    for _ in range(steps):
        noise, state = stage.update(zeros, state)
        draws.append(jax.device_get(noise))
    return draws


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: f"scale {row['scale']}")
def test_noise_has_the_recorded_distribution(row: dict[str, Any]) -> None:
    """Six standard errors of 1e6 draws on our side and on the recorded one."""
    scale, error = row["scale"], 6 * np.sqrt(2 / SAMPLES)
    (noise,) = draw(["w"], scale=scale)
    sample = noise["w"].astype(np.float64) / scale
    std, kurtosis = THEORY["std"], THEORY["kurtosis"]
    assert np.abs(sample).max() <= 2.0 + 1e-6
    assert np.abs(sample).max() > 1.9999
    assert abs(sample.mean() - row["mean"] / scale) < error * std
    assert abs(sample.std() - std) < error * std * np.sqrt((kurtosis - 1) / 4)
    assert abs(np.mean(((sample - sample.mean()) / sample.std()) ** 4) - kurtosis) < 0.02
    assert abs(np.mean(np.abs(sample)) - row["mean_abs"] / scale) < error
    for probability, quantile in row["quantiles"].items():
        p, expected = float(probability), quantile / scale
        density = np.exp(-(expected**2) / 2) / np.sqrt(2 * np.pi) / 0.9545
        assert abs(np.quantile(sample, p) - expected) < error * np.sqrt(p * (1 - p)) / density


def test_noise_of_two_parameters_steps_and_keys_is_uncorrelated() -> None:
    """Five standard errors of a correlation of 1e6 pairs."""
    first, second = draw(["a", "b"], steps=2)
    (other_key,) = draw(["a"], key=1)
    pairs = [
        (first["a"], first["b"]),
        (first["a"], second["a"]),
        (first["a"], other_key["a"]),
        (first["a"][1:], first["a"][:-1]),
    ]
    for x, y in pairs:
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(SAMPLES)


def test_a_draw_is_the_same_whatever_else_is_in_the_tree() -> None:
    (alone,), (among,) = draw(["b"], (5,)), draw(["a", "b", "c"], (5,))
    np.testing.assert_array_equal(alone["b"], among["b"])


def test_a_draw_is_the_same_in_float32_and_bfloat16_up_to_rounding() -> None:
    stage = optloss.add_gradient_noise(1.0, 0)
    full, small = ({"w": jnp.zeros(100, dtype)} for dtype in (jnp.float32, jnp.bfloat16))
    got, expected = (stage.update(tree, stage.init(tree))[0]["w"] for tree in (small, full))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, expected.astype(jnp.bfloat16))


def test_a_draw_hangs_on_the_step_and_not_on_the_way_there() -> None:
    """A state made by hand at step 3 draws what the fourth of a run draws."""
    draws = draw(["w"], (5,), steps=4)
    stage = optloss.add_gradient_noise(1.0, 0)
    zeros = {"w": jnp.zeros(5)}
    restored = stage.init(zeros)._replace(step=jnp.int32(3))
    np.testing.assert_array_equal(stage.update(zeros, restored)[0]["w"], draws[3]["w"])


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_a_seed_a_typed_key_and_its_data_are_one_key(seed: int) -> None:
    forms = [seed, np.uint32(seed), jax.random.key(seed), jax.random.PRNGKey(seed), jnp.uint32(seed)]
    first, *others = [draw(["w"], (5,), key=form)[0]["w"] for form in forms]
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_both_words_of_a_large_seed_count() -> None:
    (small,), (large,) = draw(["w"], (5,), key=5), draw(["w"], (5,), key=2**40 + 5)
    assert not np.any(small["w"] == large["w"])


def test_a_key_of_another_implementation_works() -> None:
    (noise,) = draw(["w"], (5,), key=jax.random.key(0, impl="rbg"))
    assert len(set(noise["w"].tolist())) == 5


def test_a_scale_may_be_a_function_of_the_step() -> None:
    draws = draw(["w"], (5,), scale=lambda step: jnp.where(step == 1, 0.0, 1.0), steps=2)
    assert np.all(draws[0]["w"] != 0)
    np.testing.assert_array_equal(draws[1]["w"], 0)


def test_integers_and_none_get_no_noise() -> None:
    stage = optloss.add_gradient_noise(1.0, 0)
    tree = {"n": jnp.int32(3), "none": None, "w": jnp.zeros(())}
    noisy, _ = stage.update(tree, stage.init(tree))
    assert int(noisy["n"]) == 3
    assert noisy["none"] is None
    assert float(noisy["w"]) != 0.0


def test_two_ops_with_one_seed_do_not_share_their_noise() -> None:
    def loss(params: Any) -> jax.Array:
        return 0.0 * jnp.sum(params["w"])

    moved = []
    for name in ("first", "second"):
        train = optloss.optimize_loss(loss, 0, 1.0, "SGD", gradient_noise_scale=1.0, name=name)
        moved.append(train.update(train.init({"w": jnp.zeros(5)}, key=0))[0].params["w"])
    assert not np.any(moved[0] == moved[1])


def test_optimize_loss_adds_the_noise_that_the_stage_draws() -> None:
    """The key that the stage needs is in the op's state."""
    train = optloss.optimize_loss(lambda params: 0.0 * jnp.sum(params["w"]), 0, 1.0, "SGD", gradient_noise_scale=0.5)
    state = train.init({"w": jnp.zeros(5)}, key=3)
    key = np.asarray(state.opt_states["OptimizeLoss"].noise.key)
    state, _ = train.update(state)
    (noise,) = draw(["w"], (5,), scale=0.5, key=key)
    np.testing.assert_array_equal(state.params["w"], -noise["w"])


@pytest.mark.parametrize("shape", [(1, 2**16, 2**16), (2**32, 1), (2, 1, 2**31), (1, 1, 1), (3, 2**32 - 1)])
def test_arrays_at_the_end_of_32_bits_have_noise(shape: tuple[int, ...]) -> None:
    stage = optloss.add_gradient_noise(1.0, 0)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    noisy = jax.eval_shape(lambda leaf: stage.update(leaf, stage.init(leaf))[0], leaf)
    assert noisy.shape == shape


def test_a_dimension_beyond_32_bits_is_an_error() -> None:
    stage = optloss.add_gradient_noise(1.0, 0)
    leaf = jax.ShapeDtypeStruct((2**33,), jnp.float32)
    with pytest.raises(ValueError, match=r"updates: got an array of shape \(8589934592,\); dimensions up to"):
        jax.eval_shape(lambda leaf: stage.update(leaf, stage.init(leaf))[0], leaf)


def test_each_element_of_an_array_beyond_32_bits_has_an_index_of_its_own() -> None:
    """Row-major, in two words; the compiler works out the elements that are asked for alone."""
    shape = (3, 2**17, 2**15)

    @jax.jit
    def indices(leaf_at: tuple[jax.Array, ...]) -> list[jax.Array]:
        return [word[leaf_at] for word in indices_of(jnp.zeros(shape), shape, None)]

    for at, expected in {(0, 0, 5): (5, 0), (0, 1, 0): (2**15, 0), (2, 2**17 - 1, 2**15 - 1): (2**32 - 1, 2)}.items():
        assert tuple(int(word) for word in indices(tuple(map(jnp.int32, at)))) == expected


def test_both_generators_draw_the_same_distribution_and_other_numbers() -> None:
    """Six standard errors of a standard deviation."""
    zeros, draws = {"w": jnp.zeros(SAMPLES)}, {}
    for generator in ("mixer", "threefry"):
        stage = optloss.add_gradient_noise(1.0, 0, generator=generator)
        draws[generator] = np.asarray(stage.update(zeros, stage.init(zeros))[0]["w"])
    assert np.mean(draws["mixer"] == draws["threefry"]) < 1e-4
    for sample in draws.values():
        assert abs(sample.std() - THEORY["std"]) < 6 * THEORY["std"] / np.sqrt(2 * SAMPLES)


def test_the_quantile_is_right_to_a_millionth() -> None:
    """Every number that can be drawn, against the normal distribution function from the standard library's erfc."""
    bits = jnp.arange(0, 2**32, 2**16, dtype=jnp.uint32) | jnp.uint32(0x8000)
    drawn = np.asarray(_quantile(bits, jnp.float32(1.0)), np.float64)
    t = ((np.asarray(bits).astype(np.int32) >> 8) + 0.5) / 2**23
    inside = NormalDist().cdf(2.0) - NormalDist().cdf(-2.0)
    expected = np.array([NormalDist().inv_cdf(0.5 + inside * u / 2) for u in t])
    assert np.abs(drawn - expected).max() < 1e-6
