"""Gradient multipliers: which parameter gets which factor."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optloss

PARAMS = {
    "encoder": {"layer_0": {"kernel": 1.0, "bias": 1.0}, "layer_1": {"kernel": 1.0, "bias": 1.0}},
    "head": {"kernel": 1.0},
}


def factors(multipliers: Any) -> dict[str, float]:
    """The factor that each parameter got, seen on gradients of 1."""
    stage = optloss.multiply_gradients(multipliers)
    ones = jax.tree.map(jnp.asarray, PARAMS)
    multiplied, _ = stage.update(ones, stage.init(ones))
    return dict(zip(optloss.parameter_names(ones), map(float, jax.tree.leaves(multiplied)), strict=True))


@pytest.mark.parametrize(
    ("multipliers", "changed"),
    [
        ({"head/kernel": 2.0}, {"head/kernel": 2.0}),
        ({"encoder/*/bias": 2.0}, {"encoder/layer_0/bias": 2.0, "encoder/layer_1/bias": 2.0}),
        ({"**/kernel": 2.0}, dict.fromkeys(("encoder/layer_0/kernel", "encoder/layer_1/kernel", "head/kernel"), 2.0)),
        ({"**": 2.0, "head/kernel": 3.0}, dict.fromkeys(factors({}), 2.0) | {"head/kernel": 3.0}),
        ({"encoder/layer_*/ker*": 2.0}, {"encoder/layer_0/kernel": 2.0, "encoder/layer_1/kernel": 2.0}),
        ({"head/*": 2.0, "encoder/**": 3.0}, dict.fromkeys(factors({}), 3.0) | {"head/kernel": 2.0}),
        ({"encoder/**/layer_1/**/bias": 2.0}, {"encoder/layer_1/bias": 2.0}),
    ],
)
def test_a_name_or_pattern_gives_its_factor_to_what_it_matches(multipliers: Any, changed: dict[str, float]) -> None:
    assert factors(multipliers) == dict.fromkeys(factors({}), 1.0) | changed


@pytest.mark.parametrize("pattern", ["*", "encoder/*", "kernel", "*/kernel/*", "encoder/layer_?/bias", "[eh]*/kernel"])
def test_a_pattern_that_matches_no_whole_path_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="^gradient_multipliers: no parameter"):
        factors({pattern: 2.0})


def test_a_pattern_of_many_stars_is_matched_in_a_moment() -> None:
    """A backtracking matcher would not come back from this."""
    names = "/".join("ab" * 20 for _ in range(30))
    tree = {"/".join([names, str(i)]): jnp.ones(()) for i in range(10)}
    with pytest.raises(ValueError, match="^gradient_multipliers: no parameter matches"):
        optloss.multiply_gradients({"/".join(["**", "*a" * 15] * 15) + "/x": 1.0}).init(tree)


def test_a_factor_of_one_is_the_identity_to_the_bit() -> None:
    values = jnp.asarray([1e-45, -0.0, 3.4e38, 1 / 3], jnp.float32)
    stage = optloss.multiply_gradients({"w": 1.0})
    multiplied, _ = stage.update({"w": values}, stage.init({"w": values}))
    # XLA on CPU flushes the smallest numbers; every other bit stays.
    np.testing.assert_array_equal(np.asarray(multiplied["w"][1:]).view(np.int32), np.asarray(values[1:]).view(np.int32))


def test_a_factor_may_be_a_function_of_the_step() -> None:
    stage = optloss.multiply_gradients({"w": lambda step: step + 1.0})
    state = stage.init({"w": jnp.ones(())})
    got = []
    for _ in range(3):
        multiplied, state = stage.update({"w": jnp.ones(())}, state)
        got.append(float(multiplied["w"]))
    assert got == [1.0, 2.0, 3.0]


def test_optimize_loss_gives_a_factor_its_global_step() -> None:
    train = optloss.optimize_loss(
        lambda params: jnp.sum(params["w"]), 5, 1.0, "SGD", gradient_multipliers={"w": lambda step: 1.0 * step}
    )
    state, _ = train.update(train.init({"w": jnp.zeros(())}))
    assert float(state.params["w"]) == -5.0


def test_a_factor_keeps_its_digits_on_sixteen_bit_gradients() -> None:
    """100 * 0.3 is 30; with 0.3 as bfloat16 has it, 0.30078125, it would be 30.125."""
    stage = optloss.multiply_gradients({"w": 0.3})
    gradients = {"w": jnp.asarray([100.0], jnp.bfloat16)}
    multiplied, _ = stage.update(gradients, stage.init(gradients))
    assert multiplied["w"].dtype == jnp.bfloat16
    assert float(multiplied["w"][0]) == 30.0
