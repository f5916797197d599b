"""The loops that the README shows side by side do the same, and are as long as it says."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import enable_x64
from sklearn.datasets import load_digits

import optloss

BAD = 15  # the batch that has a NaN
SPIKE = 20  # the batch whose labels are wrong, so that the clip has something to cut
HIDDEN = 32


def params(dtype: Any) -> dict[str, dict[str, jax.Array]]:
    """Of `loss`; one of the frozen zeros is negative, which adding 0 would change."""
    draw = np.random.default_rng(0)

    def kernel(rows: int, columns: int) -> jax.Array:
        return jnp.asarray(0.5 * draw.normal(0, rows**-0.5, (rows, columns)), dtype)

    return {
        "embed": {"kernel": kernel(64, HIDDEN), "bias": jnp.zeros(HIDDEN, dtype)},
        "fixed": {"kernel": kernel(HIDDEN, HIDDEN).at[0, 0].set(-0.0)},
        "dense": {"kernel": kernel(HIDDEN, 10), "bias": jnp.zeros(10, dtype)},
    }


def loss(params: Any, batch: Any) -> jax.Array:
    """Cross-entropy of digits, through a frozen layer."""
    images, labels = batch
    hidden = jax.nn.softplus(images @ params["embed"]["kernel"] + params["embed"]["bias"])
    hidden = jax.nn.softplus(hidden @ params["fixed"]["kernel"])
    logits = hidden @ params["dense"]["kernel"] + params["dense"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batches(dtype: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Thirty, of two hundred digits."""
    pixels, digits = load_digits(return_X_y=True)
    rows = np.arange(30 * 200).reshape(30, 200) % len(digits)
    images, labels = (pixels / 16).astype(dtype)[rows], digits.astype(np.int32)[rows]
    images[BAD, 3, 20] = np.nan
    labels[SPIKE] = (labels[SPIKE] + 1) % 10
    return list(zip(images, labels, strict=True))


def steps_of(loop: Callable[..., by_hand.Steps], dtype: Any, scale: float, steps: int) -> list[Any]:
    """State and summaries after each step, copied before the next step gives their memory away."""
    return [jax.tree.map(np.array, step) for step in loop(loss, params(dtype), batches(dtype)[:steps], scale)]


def assert_same_training(rtol: float, dtype: Any) -> None:
    ours, hand = (steps_of(loop, dtype, 0.0, 30) for loop in (by_hand.ours, by_hand.by_hand))
    (our_state, _), (hand_state, _) = ours[-1], hand[-1]
    for layer, name in (("embed", "kernel"), ("embed", "bias"), ("dense", "kernel"), ("dense", "bias")):
        one, other = our_state.params[layer][name], hand_state.params[layer][name]
        assert np.linalg.norm(other - one) <= rtol * np.linalg.norm(one), (layer, name)
    given = np.asarray(params(dtype)["fixed"]["kernel"]).tobytes()
    assert our_state.params["fixed"]["kernel"].tobytes() == hand_state.frozen["fixed"]["kernel"].tobytes() == given
    assert our_state.opt_states["OptimizeLoss"].nonfinite_steps == hand_state.nonfinite_steps == 1
    assert our_state.global_step == hand_state.step == 29
    clip = our_state.opt_states["OptimizeLoss"].clip
    np.testing.assert_allclose([hand_state.mean, hand_state.variance], [clip.mean, clip.variance], rtol=10 * rtol)
    for (_, one), (_, other) in zip(ours, hand, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose([other[tag] for tag in one], list(one.values()), rtol=10 * rtol)
    norm, clipped = (
        ours[SPIKE][1][f"OptimizeLoss/global_norm/{which}_norm"] for which in ("gradient", "clipped_gradient")
    )
    assert clipped < 0.9 * norm
    for steps in (ours, hand):
        before, after = (jax.tree.leaves(state) for state, _ in (steps[BAD - 1], steps[BAD]))
        assert sum(old.tobytes() != new.tobytes() for old, new in zip(before, after, strict=True)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_loop_by_hand_trains_as_ours(dtype: Any) -> None:
    """1e-5: TF1 multiplies beta2's powers up in float32, which rounds 1 - beta2**t by up to 1e-5; Optax does not."""
    with enable_x64(dtype == np.float64):
        assert_same_training(1e-5, dtype)


@pytest.mark.slow
def test_what_the_loops_differ_by_is_the_rounding_of_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one Adam in both, float64 leaves what Optax's schedule rounds: the rate is float32."""
    monkeypatch.setattr(optax, "adam", lambda learning_rate, eps: optloss.adam(learning_rate))
    with enable_x64(True):
        assert_same_training(1e-6, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("loop", [by_hand.ours, by_hand.by_hand])
def test_both_loops_add_noise_of_the_deviation_of_a_cut_normal(loop: Any) -> None:
    """Adam's first m is 0.1 * gradient, as the first step is never clipped. N(0, 1) cut at 2 has a deviation of 0.8796.

    Of n draws it is known to 0.584 / sqrt(n), as the kurtosis is 2.3655: four times that is allowed.
    """
    scale = 0.01
    given, (batch, *_) = params(np.float32), batches(np.float32)
    gradients = jax.device_get(jax.grad(loss)(given, batch))
    state, _ = steps_of(loop, np.float32, scale, 1)[0]
    m = state.opt_states["OptimizeLoss"].optimizer.m if loop is by_hand.ours else optax.tree.get(state, "mu")
    noise = {
        (layer, name): (m[layer][name] / 0.1 / multiplier - gradients[layer][name]) / scale
        for layer, multiplier in (("embed", 0.1), ("dense", 1.0))
        for name in ("kernel", "bias")
    }
    drawn = np.concatenate([array.ravel() for array in noise.values()])
    for numbers in (drawn, noise["embed", "kernel"], noise["dense", "kernel"]):
        assert np.std(numbers) == pytest.approx(0.8796, rel=4 * 0.584 / numbers.size**0.5)
    assert 1.9 < np.max(np.abs(drawn)) < 2.001
    fixed = (state.params if loop is by_hand.ours else state.frozen)["fixed"]["kernel"]
    np.testing.assert_array_equal(fixed, given["fixed"]["kernel"])


def settings_of_call(source: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "optimize_loss")
    return [keyword.arg or "**" for keyword in call.keywords]


def test_the_original_s_call_has_the_settings_of_ours() -> None:
    settings = settings_of_call(by_hand.TF1)
    assert settings == settings_of_call(inspect.getsource(by_hand.ours))
    assert settings == [name for name in inspect.signature(optloss.optimize_loss).parameters if name in settings]


def test_the_readme_has_the_table_that_by_hand_prints() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert by_hand.table() in readme
