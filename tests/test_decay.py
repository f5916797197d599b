"""The nine decays against the recorded tables, and their bad input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, read_golden

import optloss

TABLES = sorted(path.stem for path in (GOLDEN / "lr").glob("*.json"))


def rates(table: dict[str, Any], step: Any) -> jax.Array:
    function, args = getattr(optloss, table["fn"]), table["args"]
    if table["fn"] == "piecewise_constant":
        return function(step, **args)
    return function(np.float32(table["learning_rate"]), step, **args)


def check_rates(got: Any, expected: Any, initial: float) -> None:
    """5e-7 of the initial rate, or of the rate itself where that has grown beyond it.

    Of the initial rate alone, `exp_growth` (5e18 from 1e-3) and `poly_increasing` (1.2e-6 of it, one ulp) would fail.
    """
    expected = np.asarray(expected, np.float64)
    difference = np.abs(np.asarray(got, np.float64) - expected)
    assert np.all(difference <= 5e-7 * np.maximum(initial, np.abs(expected))), difference.max()


@pytest.mark.parametrize("name", TABLES)
def test_a_decay_gives_the_recorded_rates(name: str) -> None:
    table = read_golden(f"lr/{name}.json")
    got = [rates(table, step) for step in table["steps"]]
    assert {rate.dtype for rate in got} == {np.dtype(np.float32)}
    check_rates(got, table["lr"], table["learning_rate"])


@pytest.mark.parametrize("name", TABLES)
def test_a_decay_gives_the_recorded_rates_of_traced_steps(name: str) -> None:
    table = read_golden(f"lr/{name}.json")
    steps, expected = zip(*[(s, r) for s, r in zip(table["steps"], table["lr"], strict=True) if s < 2**31], strict=True)
    got = jax.jit(jax.vmap(lambda step: rates(table, step)))(np.asarray(steps, np.int32))
    check_rates(got, expected, table["learning_rate"])


def test_all_recorded_tables_are_checked() -> None:
    assert len(TABLES) == 24


@pytest.mark.parametrize("row", read_golden("noisy_linear_cosine.json")["rows"])
def test_noisy_linear_cosine_decay_has_the_recorded_mean_and_deviation(row: dict[str, Any]) -> None:
    """Within five standard errors of 100,000 draws on either side."""
    draws = 100_000
    keys = jax.random.split(jax.random.key(7), draws)
    got = jax.vmap(
        lambda key: optloss.noisy_linear_cosine_decay(row["learning_rate"], row["step"], **row["args"], key=key)
    )
    sample = np.asarray(got(keys), np.float64)
    error = row["std"] / np.sqrt(draws)
    assert abs(sample.mean() - row["mean"]) <= 5 * np.sqrt(2) * error + 1e-8
    assert abs(sample.std() - row["std"]) <= 5 * error + 1e-8


def test_noisy_linear_cosine_decay_draws_anew_at_each_step_and_key() -> None:
    got = {float(optloss.noisy_linear_cosine_decay(0.1, step, 100, key=key)) for step in range(5) for key in range(5)}
    assert len(got) == 25


@pytest.mark.parametrize("t_mul", [1.5, 2.0, 3.0, 10.0])
def test_cosine_decay_restarts_is_at_its_top_at_every_restart(t_mul: float) -> None:
    """Restarts are at 10 * (1 + t + t**2 + ...), where those are whole numbers."""
    starts = np.cumsum([0.0, *(20 * t_mul**i for i in range(12))])
    restarts = [int(s) for s in starts if s.is_integer() and s < 2**24]
    decay = jax.jit(lambda step: optloss.cosine_decay_restarts(1.0, step, 20, t_mul=t_mul))
    for step in restarts:
        assert float(decay(jnp.int32(step))) == pytest.approx(1.0, abs=1e-6), step
        assert float(optloss.cosine_decay_restarts(1.0, step, 20, t_mul=t_mul)) == pytest.approx(1.0, abs=1e-6), step


def test_a_period_need_not_be_whole() -> None:
    """By the formulas, at step 7 of periods of 2.5 steps: 2 are whole, and 0.8 of the third has passed."""
    got = [
        optloss.exponential_decay(1.0, 7, 2.5, 0.5),
        optloss.exponential_decay(1.0, 7, 2.5, 0.5, staircase=True),
        optloss.inverse_time_decay(1.0, 7, 2.5, 0.5, staircase=True),
        optloss.cosine_decay_restarts(1.0, 7, 2.5, t_mul=1.0),
        jax.jit(optloss.cosine_decay)(1.0, 2, 2.5),
    ]
    expected = [0.5**2.8, 0.25, 1 / 2, 0.5 * (1 + np.cos(0.8 * np.pi)), 0.5 * (1 + np.cos(0.8 * np.pi))]
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("step", [2**24 + 1, 2**31 - 1])
def test_a_staircase_is_exact_at_steps_that_float32_does_not_tell_apart(step: int) -> None:
    """From (step - 1) to step = 1 * N + 0 the stair goes down by one: 0.5 -> 0.25 of the rate, with N = step."""
    got = [float(optloss.exponential_decay(1.0, jnp.int32(s), step, 0.5, staircase=True)) for s in (step - 1, step)]
    assert got == [1.0, 0.5]


def test_from_schedule_multiplies_the_rate_by_the_schedule() -> None:
    decay = optloss.from_schedule(optax.piecewise_constant_schedule(1.0, {10: 0.5}))
    assert [float(decay(0.2, step)) for step in (0, 20)] == pytest.approx([0.2, 0.1])


def test_scale_by_decayed_learning_rate_multiplies_by_minus_the_rate_of_each_step() -> None:
    stage = optloss.scale_by_decayed_learning_rate(
        1.0, lambda rate, step: optloss.exponential_decay(rate, step, 1, 0.5)
    )
    state = stage.init({"w": jnp.zeros(())})
    got = []
    for _ in range(3):
        updates, state = stage.update({"w": jnp.ones(())}, state)
        got.append(float(updates["w"]))
    assert got == [-1.0, -0.5, -0.25]


def test_scale_by_decayed_learning_rate_equals_optax_without_a_decay() -> None:
    stage, twin = optloss.scale_by_decayed_learning_rate(0.3), optax.scale_by_learning_rate(0.3)
    updates = {"w": jnp.linspace(-1.0, 1.0, 11)}
    got, _ = stage.update(updates, stage.init(updates))
    np.testing.assert_array_equal(got["w"], twin.update(updates, twin.init(updates))[0]["w"])


BAD = [
    (optloss.exponential_decay, (0.1, None, 10, 0.5), ValueError, "global_step: got None"),
    (optloss.exponential_decay, (0.1, 0, 0, 0.5), ValueError, "decay_steps: got 0; a finite number > 0 would do"),
    (optloss.exponential_decay, (0.1, 0, 10, -0.5), ValueError, "decay_rate: got -0.5"),
    (optloss.natural_exp_decay, (0.1, 0, 10, float("nan")), ValueError, "decay_rate: got nan"),
    (optloss.inverse_time_decay, (0.1, 0, -1, 0.5), ValueError, "decay_steps: got -1"),
    (optloss.polynomial_decay, (0.1, 0, 0), ValueError, "decay_steps: got 0"),
    (optloss.polynomial_decay, (0.1, 0, 10, 0.0, -1.0), ValueError, "power: got -1.0"),
    (optloss.cosine_decay, (0.1, 0, "10"), TypeError, "decay_steps: got '10' of type str"),
    (optloss.cosine_decay_restarts, (0.1, 0, 10, 0.5), ValueError, "t_mul: got 0.5; a finite number >= 1"),
    (optloss.linear_cosine_decay, (0.1, None, 10), ValueError, "global_step: got None"),
    (optloss.noisy_linear_cosine_decay, (0.1, 0, 10, -1.0), ValueError, "initial_variance: got -1.0"),
    (optloss.piecewise_constant, (None, [1], [1.0, 2.0]), ValueError, "global_step: got None"),
    (optloss.piecewise_constant, (0, [], [1.0]), ValueError, "values: got 1 for 0 boundaries"),
    (optloss.piecewise_constant, (0, [1, 2], [1.0, 2.0]), ValueError, "values: got 2 for 2 boundaries"),
    (optloss.piecewise_constant, (0, [2, 1], [1.0, 2.0, 3.0]), ValueError, r"boundaries: got \[2, 1\]"),
    (optloss.piecewise_constant, (0, [1.5], [1.0, 2.0]), ValueError, "boundaries: got 1.5; integers"),
    (optloss.from_schedule, (0.1,), TypeError, "schedule: got 0.1"),
    (optloss.scale_by_decayed_learning_rate, (-0.1,), ValueError, "learning_rate: got -0.1"),
]


@pytest.mark.parametrize(("function", "args", "error", "message"), BAD)
def test_a_bad_setting_is_an_error_that_names_it(function: Any, args: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        function(*args)


@pytest.mark.parametrize("t_mul", [2, 3])
@pytest.mark.parametrize("first", [7, 1000])
def test_restarts_come_at_their_very_step_however_late(first: int, t_mul: int) -> None:
    """The step before one is at the end of a period, where the cosine is low; by integers in Python.

    Up to 2**24 first periods, the integers that float32 has.
    """
    decay = jax.jit(lambda step: optloss.cosine_decay_restarts(1.0, step, first, t_mul=float(t_mul), m_mul=0.9))
    start = 0
    for period in range(1, 40):
        length = first * t_mul ** (period - 1)
        start += length
        if start >= min(2**31, 2**24 * first):
            break
        at_end = 0.5 * (1 + np.cos(np.pi * (length - 1) / length)) * 0.9 ** (period - 1)
        assert float(decay(jnp.int32(start - 1))) == pytest.approx(at_end, abs=1e-6), start
        assert float(decay(jnp.int32(start))) == pytest.approx(0.9**period, abs=1e-6), start
