"""Histograms, and that summaries are figures the step has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optloss


def test_a_histogram_has_the_fields_of_tensorflow() -> None:
    values = np.array([-3.0, -1e-13, 0.0, 0.0, 1e-12, 0.25, 7.0, 7.0], np.float32)
    h = jax.device_get(optloss.histogram(jnp.asarray(values)))
    assert (int(h.num), float(h.min), float(h.max)) == (8, -3.0, 7.0)
    np.testing.assert_allclose([h.sum, h.sum_squares], [11.25, 107.0625], rtol=1e-6)
    for value, count in ((-3.0, 1), (-1e-13, 1), (0.0, 2), (1e-12, 1), (0.25, 1), (7.0, 2)):
        bucket = np.searchsorted(h.bucket_limit, np.float32(value), side="right")
        assert h.bucket[bucket] == count, value
        assert h.bucket_limit[bucket - 1] <= value < h.bucket_limit[bucket]


def test_bucket_limits_grow_by_a_tenth_on_either_side_of_zero() -> None:
    """1e-12 * 1.1**k below 1e20 is k < 32 * ln(10) / ln(1.1) = 773.1: 774 limits, and the largest float, a side."""
    limits = np.asarray(optloss.histogram(jnp.ones(1)).bucket_limit, np.float64)
    assert len(limits) == 2 * 775 + 1
    np.testing.assert_array_equal(limits, -limits[::-1])
    positive = limits[776:-1]
    assert positive[0] == np.float32(1e-12)
    np.testing.assert_allclose(positive[1:] / positive[:-1], 1.1, rtol=3e-7)
    assert positive[-1] < 1e20 <= positive[-1] * 1.1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_histogram_leaves_out_what_is_not_finite(dtype: Any) -> None:
    h = optloss.histogram(jnp.asarray([[np.nan, 1.0], [np.inf, -np.inf]], dtype))
    assert (int(h.num), float(h.min), float(h.max), float(h.sum), int(h.bucket.sum())) == (1, 1.0, 1.0, 1.0, 1)


def test_a_histogram_counts_the_largest_float() -> None:
    h = optloss.histogram(jnp.asarray([np.finfo(np.float32).max, -np.finfo(np.float32).max]))
    assert (int(h.num), int(h.bucket.sum()), int(h.bucket[-1])) == (2, 2, 1)


def test_a_histogram_of_nothing_is_empty() -> None:
    h = optloss.histogram(jnp.ones((0, 3)))
    assert (int(h.num), int(h.bucket.sum()), float(h.sum)) == (0, 0, 0.0)


def loss(params: Any) -> jax.Array:
    return 3.0 * params["a"] + 4.0 * params["b"]


def test_norms_before_and_after_clipping_are_reported() -> None:
    """The gradient is (3, 4) with norm 5; clipped to 1 it is (0.6, 0.8)."""
    train = optloss.optimize_loss(
        loss, 0, 0.1, "SGD", clip_gradients=1.0, summaries=["gradient_norm", "loss", "nonfinite_steps"], name="net"
    )
    _, out = train.update(train.init({"a": 1.0, "b": 1.0}))
    got = {tag: pytest.approx(float(value), rel=1e-6) for tag, value in out.summaries.items()}
    assert got == {
        "net/loss": 7.0,
        "net/nonfinite_steps": 0.0,
        "net/global_norm/gradient_norm": 5.0,
        "net/global_norm/clipped_gradient_norm": 1.0,
        "net/gradient_norm/a": 0.6,
        "net/gradient_norm/b": 0.8,
    }
    assert {value.dtype for value in out.summaries.values()} == {np.dtype(np.float32)}


def test_a_skipped_step_shows_what_was_wrong_and_is_counted() -> None:
    train = optloss.optimize_loss(
        lambda p, x: p["a"] * x, 0, 0.1, "SGD", summaries=["loss", "global_gradient_norm", "nonfinite_steps"]
    )
    state = train.init({"a": 1.0})
    for x in (1.0, np.inf, 1.0, np.nan):
        state, out = train.update(state, x)
    assert np.isnan(out.summaries["OptimizeLoss/loss"])
    assert np.isnan(out.summaries["OptimizeLoss/global_norm/gradient_norm"])
    assert float(out.summaries["OptimizeLoss/nonfinite_steps"]) == 2.0


def test_the_decayed_rate_is_reported_as_the_step_used_it() -> None:
    train = optloss.optimize_loss(
        loss, 3, 0.8, "SGD", learning_rate_decay_fn=lambda rate, step: optloss.exponential_decay(rate, step, 1, 0.5)
    )
    _, out = train.update(train.init({"a": 1.0, "b": 1.0}))
    assert float(out.summaries["OptimizeLoss/learning_rate"]) == pytest.approx(0.1)


def test_summaries_that_are_not_asked_for_cost_nothing() -> None:
    """Two steps without summaries, built apart, are one program; with histograms it does more."""

    def operations(summaries: Any) -> float:
        train = optloss.optimize_loss(loss, 0, 0.1, "SGD", clip_gradients=1.0, summaries=summaries)
        state = train.init({"a": jnp.ones(()), "b": jnp.ones(())})
        return len(train.update.lower(state).compile().as_text().splitlines())

    assert operations([]) <= operations(["loss"]) < operations(["gradients"])
