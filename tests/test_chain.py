"""What a chain of Optax's transformations, put together by hand, does; and what `optimize_loss` does instead."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss


def step_of_chain(chain: Any, params: Any, gradients: Any) -> Any:
    updates, _ = chain.update(gradients, chain.init(params), params)
    return optax.apply_updates(params, updates)


def step_of_optimize_loss(params: Any, gradients: Any, optimizer: Any = "SGD", rate: Any = 1.0, **settings: Any) -> Any:
    """One step on a loss that has these gradients."""

    def loss(params: Any) -> jax.Array:
        terms = jax.tree.map(lambda p, g: jnp.sum((p * g).astype(jnp.float32)), params, gradients)
        return sum(jax.tree.leaves(terms))

    train = optloss.optimize_loss(loss, 0, rate, optimizer, **settings)
    state, _ = train.update(train.init(params, key=0))
    return state.params


@pytest.mark.slow
def test_a_chain_lets_bfloat16_gradients_through_a_clip() -> None:
    """320 leaves of 1: Optax adds 256 of them and no more, so a limit of 0.9 of the true norm changes nothing."""
    leaves = [jnp.ones(1, jnp.bfloat16) for _ in range(320)]
    norm = float(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in leaves)))
    chain = optax.clip_by_global_norm(0.9 * norm)
    by_chain, _ = chain.update(leaves, chain.init(leaves))
    ours = optloss.clip_by_global_norm(0.9 * norm)
    by_us, _ = jax.jit(ours.update)(leaves, ours.init(leaves))
    norms = [
        np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in tree)) / norm for tree in (by_chain, by_us)
    ]
    assert norms == [pytest.approx(1.0, abs=1e-6), pytest.approx(0.9, rel=5e-3)]


def test_a_chain_throws_a_large_finite_gradient_away() -> None:
    """The square of 1e20 overflows: Optax's clip makes 0 of everything; the direction is (0.6, 0.8)."""
    params, gradients = {"w": jnp.zeros(2)}, {"w": jnp.asarray([3e20, 4e20])}
    chained = step_of_chain(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), params, gradients)
    np.testing.assert_array_equal(chained["w"], 0.0)
    np.testing.assert_allclose(
        step_of_optimize_loss(params, gradients, clip_gradients=1.0)["w"], [-0.6, -0.8], rtol=1e-6
    )


def test_a_chain_kills_a_parameter_by_one_large_finite_gradient() -> None:
    """Adam's average of squares becomes infinite; nothing is NaN, and nothing ever moves again."""
    chain, params = optax.apply_if_finite(optax.adam(0.1), 5), {"w": jnp.zeros(1)}
    state = chain.init(params)
    update = jax.jit(chain.update)
    for gradient in (1e20, *[1.0] * 50):
        updates, state = update({"w": jnp.full(1, gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    assert (float(params["w"][0]), int(state.total_notfinite)) == (0.0, 0)
    train = optloss.optimize_loss(lambda p, x: jnp.sum(p["w"]) * x, 0, 0.1, "Adam")
    state = train.init({"w": jnp.zeros(1)})
    for gradient in (1e20, *[1.0] * 50):
        state, _ = train.update(state, jnp.float32(gradient))
    assert float(state.params["w"][0]) == pytest.approx(-5.0, rel=1e-3)
    assert int(state.opt_states["OptimizeLoss"].nonfinite_steps) == 1


def test_a_chain_accepts_a_nan_in_the_end() -> None:
    """`apply_if_finite` gives up after its limit of bad steps; and it does not look at the loss."""
    chain, params = optax.apply_if_finite(optax.sgd(0.1), 2), {"w": jnp.zeros(1)}
    state = chain.init(params)
    update = jax.jit(chain.update)
    for _ in range(3):
        updates, state = update({"w": jnp.full(1, jnp.nan)}, state, params)
        params = optax.apply_updates(params, updates)
    assert np.isnan(params["w"][0])
    train = optloss.optimize_loss(lambda p, x: jnp.sum(p["w"]) * x, 0, 0.1, "SGD")
    state = train.init({"w": jnp.zeros(1)})
    for _ in range(20):
        state, _ = train.update(state, jnp.nan)
    np.testing.assert_array_equal(state.params["w"], 0.0)


FROZEN = {"a": jnp.ones(1), "frozen": jnp.ones(1)}
MASK = {"a": False, "frozen": True}


def test_a_chain_counts_frozen_gradients_in_the_norm() -> None:
    gradients = {"a": jnp.ones(1), "frozen": jnp.full(1, 100.0)}
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0), optax.transforms.freeze(MASK))
    assert float(step_of_chain(chain, FROZEN, gradients)["a"][0]) == pytest.approx(0.99, abs=1e-3)
    ours = step_of_optimize_loss(FROZEN, gradients, clip_gradients=1.0, variables=["a"])
    assert (float(ours["a"][0]), float(ours["frozen"][0])) == (0.0, 1.0)


@pytest.mark.slow
def test_a_chain_moves_frozen_parameters() -> None:
    """By noise, by weight decay, and, where `masked` was meant to freeze, up the gradient."""
    zero, one = jax.tree.map(jnp.zeros_like, FROZEN), jax.tree.map(jnp.ones_like, FROZEN)
    noisy = optax.chain(optax.transforms.freeze(MASK), optax.add_noise(0.1, 0.0, key=0), optax.sgd(1.0))
    decayed = optax.chain(optax.transforms.freeze(MASK), optax.adamw(0.1, weight_decay=0.1))
    masked = optax.masked(optax.sgd(1.0), jax.tree.map(lambda frozen: not frozen, MASK))
    assert float(step_of_chain(noisy, FROZEN, zero)["frozen"][0]) != 1.0
    assert float(step_of_chain(decayed, FROZEN, zero)["frozen"][0]) == pytest.approx(0.99)
    assert float(step_of_chain(masked, FROZEN, one)["frozen"][0]) == 2.0
    for optimizer in ("SGD", "adamw"):
        ours = step_of_optimize_loss(FROZEN, one, optimizer, variables=["a"], gradient_noise_scale=0.1)
        assert float(ours["frozen"][0]) == 1.0
        assert float(ours["a"][0]) != 1.0


def test_a_chain_changes_a_parameter_s_noise_when_another_comes() -> None:
    noise = optax.add_noise(1.0, 0.0, key=0)
    drawn = [
        noise.update(tree, noise.init(tree))[0]["b"][0]
        for tree in ({"b": jnp.zeros(1)}, {"a": jnp.zeros(1), "b": jnp.zeros(1)})
    ]
    assert float(drawn[0]) != float(drawn[1])
    ours = optloss.add_gradient_noise(1.0, key=0)
    drawn = [
        ours.update(tree, ours.init(tree))[0]["b"][0]
        for tree in ({"b": jnp.zeros(1)}, {"a": jnp.zeros(1), "b": jnp.zeros(1)})
    ]
    assert float(drawn[0]) == float(drawn[1])


def test_a_chain_with_noise_has_a_state_that_numpy_cannot_hold() -> None:
    with pytest.raises(TypeError):
        jax.tree.map(np.asarray, optax.add_noise(1.0, 0.0, key=jax.random.key(0)).init({"w": jnp.zeros(1)}))
    train = optloss.optimize_loss(lambda p: p["w"], 0, 0.1, "Adam", gradient_noise_scale=1.0)
    state = jax.tree.map(np.asarray, train.init({"w": 1.0}, key=0))
    assert all(leaf.dtype != object for leaf in jax.tree.leaves(state))


def test_a_chain_rounds_the_rate_to_the_gradients_dtype() -> None:
    """1e-8 is 0 in float16; here the update is computed in float32 and is the smallest float16 above it."""
    params, gradients = {"w": jnp.zeros(1, jnp.float16)}, {"w": jnp.full(1, 1000.0, jnp.float16)}
    chained = step_of_chain(optax.sgd(optax.constant_schedule(1e-8)), params, gradients)
    assert float(chained["w"][0]) == 0.0
    assert float(step_of_optimize_loss(params, gradients, rate=1e-8)["w"][0]) == pytest.approx(-1e-5, rel=1e-2)


def test_a_chain_that_monitors_cannot_be_scanned() -> None:
    chain = optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.sgd(0.1))
    params = {"w": jnp.ones(1)}
    with pytest.raises(TypeError):
        jax.lax.scan(lambda s, _: (chain.update(params, s)[1], None), chain.init(params), None, length=2)
    ours = optloss.transformation(0, 0.1, "SGD")
    state, _ = jax.lax.scan(lambda s, _: (ours.update(params, s, params)[1], None), ours.init(params), None, length=2)
    assert float(state.summaries["OptimizeLoss/global_norm/gradient_norm"]) == 1.0


def test_a_chain_takes_nonsense_for_a_setting() -> None:
    """No rate and a negative limit climb the gradient; a misspelt name masks nothing. Here each is an error."""
    params, gradients = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    assert float(step_of_chain(optax.sgd(None), params, gradients)["w"][0]) == 1.0
    negative = optax.chain(optax.clip_by_global_norm(-1.0), optax.sgd(1.0))
    assert float(step_of_chain(negative, params, gradients)["w"][0]) == 1.0
    for settings in ({"rate": None}, {"clip_gradients": -1.0}, {"gradient_multipliers": {"v": 1.0}}):
        with pytest.raises(ValueError, match="^(learning_rate|clip_gradients|gradient_multipliers): "):
            step_of_optimize_loss(params, gradients, **settings)
