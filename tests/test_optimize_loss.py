"""The call: what the original's own tests asserted, and each argument as its users would use it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import enable_x64

import optloss


def absolute(params: Any, x: Any = 5.0) -> jax.Array:
    """The model of the original's tests: var = 10, x = 5, a gradient of 5."""
    return jnp.abs(params["var"] * x)


def after_one_step(loss: Any = absolute, optimizer: Any = "SGD", **settings: Any) -> tuple[Any, Any]:
    settings = {"global_step": 0, "learning_rate": 0.1, **settings}
    train = optloss.optimize_loss(loss, optimizer=optimizer, **settings)
    return train.update(train.init({"var": 10.0}, key=0))


@pytest.mark.parametrize(
    "optimizer",
    ["SGD", optloss.sgd, optloss.sgd(0.1), lambda rate: optloss.sgd(rate), "Momentum", optax.sgd, optax.sgd(0.1)],
)
def test_every_form_of_an_optimizer_steps_from_10_to_9_5(optimizer: Any) -> None:
    state, out = after_one_step(optimizer=optimizer)
    assert (float(state.params["var"]), int(state.global_step), float(out.loss)) == (9.5, 1, 50.0)


def test_no_rate_and_a_function_of_nothing_step_from_10_to_9_5() -> None:
    state, _ = after_one_step(optimizer=lambda: optloss.sgd(0.1), learning_rate=None)
    assert float(state.params["var"]) == 9.5
    assert state.opt_states["OptimizeLoss"].learning_rate is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"clip_gradients": 0.1}, 9.99),
        ({"clip_gradients": optloss.adaptive_clipping_fn()}, 9.8916),
        ({"gradient_multipliers": {"var": 7.0}}, 6.5),
        ({"gradient_multipliers": {"var": jnp.float32(7.0)}}, 6.5),
        ({"gradient_multipliers": {"var": np.float64(7.0)}}, 6.5),
        ({"global_step": None}, 9.5),
        ({"learning_rate_decay_fn": lambda rate, step: rate}, 9.5),
    ],
)
def test_the_original_s_own_tests_hold(settings: Any, expected: float) -> None:
    state, _ = after_one_step(**settings)
    assert float(state.params["var"]) == pytest.approx(expected, abs=1e-4)


def test_noise_changes_the_update_by_at_most_two_scales() -> None:
    state, _ = after_one_step(gradient_noise_scale=10.0)
    assert 0.0 < abs(float(state.params["var"]) - 9.5) <= 0.1 * 2 * 10.0


def test_without_a_counter_there_is_none() -> None:
    assert after_one_step(global_step=None)[0].global_step is None


def test_increment_global_step_false_leaves_the_step() -> None:
    state, _ = after_one_step(global_step=7, increment_global_step=False)
    assert (float(state.params["var"]), int(state.global_step)) == (9.5, 7)


@pytest.mark.parametrize("first", [0, 2**24 + 1, 2**31 - 2, 2**31 - 1])
def test_a_large_step_counts_exactly_and_stays_at_the_largest(first: int) -> None:
    assert int(after_one_step(global_step=first)[0].global_step) == min(first + 1, 2**31 - 1)


def test_with_x64_the_step_goes_beyond_32_bits() -> None:
    with enable_x64(True):
        assert int(after_one_step(global_step=2**40)[0].global_step) == 2**40 + 1


def test_a_parameter_without_a_gradient_is_no_error() -> None:
    train = optloss.optimize_loss(
        absolute, 0, 0.1, "SGD", gradient_multipliers={"unused": 2.0, "var": 1.0}, clip_gradients=10.0
    )
    state, _ = train.update(train.init({"var": 10.0, "unused": 1.0}))
    assert {name: float(value) for name, value in state.params.items()} == {"var": 9.5, "unused": 1.0}


# ---- the learning rate in the state ----------------------------------------------------------------------------------


def test_a_rate_put_into_the_state_is_used_without_a_recompilation() -> None:
    traces = []

    def loss(params: Any) -> jax.Array:
        traces.append(1)
        return absolute(params)

    train = optloss.optimize_loss(loss, 0, 0.1, "SGD")
    state, _ = train.update(train.init({"var": 10.0}))
    state, _ = train.update(optax.tree.set(state, learning_rate=jnp.float32(0.2)))
    assert float(state.params["var"]) == 8.5
    assert len(traces) == 1


def test_vmap_over_rates_trains_them_all_in_one_program() -> None:
    rates = np.asarray([0.1, 0.2, 0.4], np.float32)
    train = optloss.optimize_loss(absolute, 0, 0.1, "Adam")
    states = jax.vmap(lambda rate: optax.tree.set(train.init({"var": 10.0}), learning_rate=rate))(rates)
    for _ in range(3):
        states, _ = jax.vmap(train.update)(states)
    for i, rate in enumerate(rates):
        single = optloss.optimize_loss(absolute, 0, float(rate), "Adam")
        state = single.init({"var": 10.0})
        for _ in range(3):
            state, _ = single.update(state)
        assert float(states.params["var"][i]) == pytest.approx(float(state.params["var"]), rel=1e-6)


def test_a_traced_rate_is_taken_at_construction() -> None:
    def trained(rate: jax.Array) -> jax.Array:
        train = optloss.optimize_loss(absolute, 0, rate, "SGD")
        state, _ = jax.lax.scan(train.update, train.init({"var": 10.0}), jnp.full(3, 5.0))
        return state.params["var"]

    np.testing.assert_allclose(jax.jit(jax.vmap(trained))(jnp.asarray([0.1, 0.2])), [8.5, 7.0], rtol=1e-6)


# ---- aux, model state and update ops ---------------------------------------------------------------------------------


def counting(params: Any, model_state: Any, x: Any) -> Any:
    """A loss that reads a mean and returns a new one, as batch normalisation does."""
    return absolute(params, x), {"mean": 0.5 * model_state["mean"] + 0.5 * x}


@pytest.mark.parametrize(
    ("update_ops", "mean"),
    [
        (None, 2.5),  # what the loss returned
        ([], 0.0),  # dropped
        ([lambda s, x: {"mean": s["mean"] + x}, lambda s, x: {"mean": 10 * s["mean"]}], 50.0),  # in order
    ],
)
def test_update_ops_say_what_becomes_of_the_model_state(update_ops: Any, mean: float) -> None:
    train = optloss.optimize_loss(counting, 0, 0.1, "SGD", update_ops=update_ops)
    state, _ = train.update(train.init({"var": 10.0}, 5.0, model_state={"mean": 0.0}), 5.0)
    assert (float(state.model_state["mean"]), float(state.params["var"])) == (mean, 9.5)


def test_update_ops_run_before_the_loss() -> None:
    train = optloss.optimize_loss(
        lambda params, model_state: params["var"] * model_state, 0, 0.1, "SGD", update_ops=[lambda s: s + 1.0]
    )
    _, out = train.update(train.init({"var": 10.0}, model_state=4.0))
    assert float(out.loss) == 50.0


def test_has_aux_gives_what_the_loss_returns_besides() -> None:
    train = optloss.optimize_loss(lambda p: (absolute(p), {"logits": p["var"] + 1}), 0, 0.1, "SGD", has_aux=True)
    _, out = train.update(train.init({"var": 10.0}))
    assert float(out.aux["logits"]) == 11.0


def test_has_aux_and_a_model_state_come_as_a_pair() -> None:
    train = optloss.optimize_loss(lambda p, s: (absolute(p), (s + 1, "aux"[:0] or s)), 0, 0.1, "SGD", has_aux=True)
    state, out = train.update(train.init({"var": 10.0}, model_state=3.0))
    assert (float(state.model_state), float(out.aux)) == (4.0, 3.0)


# ---- variables: what is not selected costs nothing -------------------------------------------------------------------


def two_layers(params: Any, x: Any) -> jax.Array:
    return jnp.sum(jnp.tanh(x @ params["first"]) @ params["last"])


WIDE = {"first": np.ones((256, 256), np.float32), "last": np.ones((256, 4), np.float32)}


def cost_of(variables: Any) -> tuple[float, int, Any, Any]:
    """Floating point operations of the compiled step, bytes of the optimizer's slots, and the states around a step."""
    train = optloss.optimize_loss(two_layers, 0, 0.1, "Adam", gradient_noise_scale=0.0, variables=variables)
    before, x = train.init(WIDE), np.ones((8, 256), np.float32)
    flops = train.update.lower(before, x).compile().cost_analysis()["flops"]
    slots = sum(leaf.nbytes for leaf in jax.tree.leaves(before.opt_states["OptimizeLoss"].optimizer))
    after, _ = train.update(train.init(WIDE), x)
    return flops, slots, before, after


@pytest.mark.slow
def test_parameters_that_are_not_selected_have_no_slots_and_no_gradient() -> None:
    """The gradient of the first layer is 2 * 8 * 256 * 256 operations; Adam's two slots are 8 bytes each."""
    all_flops, all_slots, _, _ = cost_of(None)
    flops, slots, before, after = cost_of(["last"])
    assert all_slots - slots == 8 * WIDE["first"].size
    assert all_flops - flops > 2 * 8 * 256 * 256
    np.testing.assert_array_equal(after.params["first"], before.params["first"])
    assert np.any(np.asarray(after.params["last"]) != np.asarray(before.params["last"]))


def test_parameters_that_are_not_selected_have_no_noise_and_no_part_in_the_norm() -> None:
    train = optloss.optimize_loss(
        lambda p: 3 * p["a"] + 100 * p["b"],
        0,
        1.0,
        "SGD",
        gradient_noise_scale=1e-6,
        variables=["a"],
        clip_gradients=3.0,
    )
    state, out = train.update(train.init({"a": 0.0, "b": -0.0}, key=0))
    assert float(out.summaries["OptimizeLoss/global_norm/gradient_norm"]) == pytest.approx(3.0, rel=1e-5)
    assert float(state.params["a"]) == pytest.approx(-3.0, rel=1e-5)
    assert np.signbit(state.params["b"])
    assert float(state.params["b"]) == 0.0


# ---- several ops on one state ----------------------------------------------------------------------------------------


def gan_losses() -> tuple[Any, Any]:
    """A generator x -> a * z + b that learns N(3, 0.5) against a quadratic discriminator."""

    def features(d: Any, x: jax.Array) -> jax.Array:
        return d["u"] * x + d["v"] * x**2 + d["c"]

    def discriminator(params: Any, real: jax.Array, z: jax.Array) -> jax.Array:
        g, d = params["generator"], params["discriminator"]
        fake = g["a"] * z + g["b"]
        return jnp.mean(jax.nn.softplus(-features(d, real))) + jnp.mean(jax.nn.softplus(features(d, fake)))

    def generator(params: Any, real: jax.Array, z: jax.Array) -> jax.Array:
        g, d = params["generator"], params["discriminator"]
        return jnp.mean(jax.nn.softplus(-features(d, g["a"] * z + g["b"])))

    return discriminator, generator


@pytest.mark.slow
def test_two_ops_train_a_gan_on_one_state() -> None:
    """Two losses, two subsets, one shared step that the generator's op alone moves."""
    discriminator_loss, generator_loss = gan_losses()
    settings = {"optimizer": "Adam", "clip_gradients": 1.0}
    d_op = optloss.optimize_loss(
        discriminator_loss, 0, 0.02, variables=["discriminator/*"], name="D", increment_global_step=False, **settings
    )
    g_op = optloss.optimize_loss(generator_loss, 0, 0.01, variables=["generator/*"], name="G", **settings)
    params = {"generator": {"a": 1.0, "b": 0.0}, "discriminator": {"u": 0.0, "v": 0.0, "c": 0.0}}
    state = g_op.init(d_op.init(params))

    def both(state: Any, key: jax.Array) -> tuple[Any, Any]:
        real, z = jax.random.normal(key, (2, 256))
        real = 3.0 + 0.5 * real
        state, d_out = d_op.update(state, real, z)
        state, g_out = g_op.update(state, real, z)
        return state, {**d_out.summaries, **g_out.summaries}

    first, _ = both(jax.tree.map(jnp.copy, state), jax.random.key(0))
    assert int(first.global_step) == 1
    assert set(first.opt_states) == {"D", "G"}
    state, summaries = jax.lax.scan(both, state, jax.random.split(jax.random.key(1), 3000))
    assert int(state.global_step) == 3000
    assert float(state.params["generator"]["b"]) == pytest.approx(3.0, abs=0.3)
    assert {tag.split("/")[0] for tag in summaries} == {"D", "G"}


def test_an_op_leaves_the_parameters_and_slots_of_another_as_they_are() -> None:
    discriminator_loss, generator_loss = gan_losses()
    d_op = optloss.optimize_loss(discriminator_loss, 5, 0.1, "Adam", variables=["discriminator/*"], name="D")
    g_op = optloss.optimize_loss(generator_loss, None, 0.1, "Adam", variables=["generator/*"], name="G")
    params = {"generator": {"a": 1.0, "b": 0.0}, "discriminator": {"u": 0.5, "v": 0.5, "c": 0.5}}
    state = g_op.init(d_op.init(params))
    before = jax.device_get(state)
    batch = jnp.ones(4), jnp.linspace(-1.0, 1.0, 4)
    state, _ = g_op.update(state, *batch)
    after = jax.device_get(state)
    assert after.params["discriminator"] == before.params["discriminator"]
    jax.tree.map(np.testing.assert_array_equal, after.opt_states["D"], before.opt_states["D"])
    assert after.params["generator"] != before.params["generator"]
    assert int(after.global_step) == 6  # an op without a counter of its own moves the one it finds, as in TF1


# ---- the state and the caller's arrays -------------------------------------------------------------------------------


def test_what_the_caller_gave_stays_alive() -> None:
    params = {"var": jnp.full((3,), 10.0), "same": jnp.zeros(3)}
    params["same too"] = params["same"]
    train = optloss.optimize_loss(lambda p: jnp.sum(p["var"]), 0, 0.1, "Adam")
    train.update(train.init(params))
    train.update(train.init(params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_step_donates_its_state() -> None:
    """What a step changes; a newer JAX hands on, instead, what it leaves as it is."""
    train = optloss.optimize_loss(absolute, 0, 0.1, "Adam")
    state = train.init({"var": 10.0})
    train.update(state)
    changed = (state.global_step, state.params, state.opt_states["OptimizeLoss"].optimizer)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(changed))


def test_scan_runs_the_steps_of_a_loop() -> None:
    train = optloss.optimize_loss(absolute, 0, 0.1, "Adam", gradient_noise_scale=0.1)
    batches = jnp.linspace(1.0, 5.0, 7)
    scanned, outs = jax.lax.scan(train.update, train.init({"var": 10.0}, key=0), batches)
    state = train.init({"var": 10.0}, key=0)
    for batch in batches:
        state, out = train.update(state, batch)
    np.testing.assert_allclose(scanned.params["var"], state.params["var"], rtol=1e-6)
    np.testing.assert_allclose(outs.loss[-1], out.loss, rtol=1e-6)


# ---- steps that are not finite ---------------------------------------------------------------------------------------


def full_op(**settings: Any) -> optloss.TrainOp:
    return optloss.optimize_loss(
        lambda p, s, x: (jnp.sum(p["w"] ** 2 * x[0]), 0.9 * s + x[1]),
        0,
        0.01,
        "Adam",
        gradient_noise_scale=0.01,
        clip_gradients=optloss.adaptive_clipping_fn(global_step=True),
        learning_rate_decay_fn=lambda rate, step: optloss.exponential_decay(rate, step, 10, 0.5),
        **settings,
    )


@pytest.mark.parametrize(
    "bad",
    [(np.nan, 1.0), (np.inf, 1.0), (-np.inf, 1.0), (3e38, 1.0), (1.0, np.nan), (1.0, np.inf)],
    ids=["nan", "inf", "minus inf", "overflow", "model state nan", "model state inf"],
)
def test_a_run_with_bad_batches_equals_the_run_without_them(bad: Any) -> None:
    """To the bit, but for the count: noise, averages, decay, slots, model state and step."""
    train = full_op()
    good = [(1.0, 0.5), (2.0, 0.25), (0.5, 1.0)]
    final = []
    for batches in (good, [bad, good[0], bad, bad, good[1], good[2], bad]):
        state = train.init({"w": np.linspace(-2.0, 2.0, 5, dtype=np.float32)}, key=0, model_state=0.0)
        for batch in batches:
            state, _ = train.update(state, jnp.asarray(batch, jnp.float32))
        final.append(jax.device_get(state))
    dirty = final[1]
    assert int(dirty.opt_states["OptimizeLoss"].nonfinite_steps) == 4
    clean_leaves, dirty_leaves = (jax.tree.leaves(optax.tree.set(s, nonfinite_steps=np.int32(0))) for s in final)
    for a, b in zip(clean_leaves, dirty_leaves, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_finite_gradient_whose_square_overflows_does_not_kill_a_slot() -> None:
    """1e20 squared is beyond float32: Adam's v would be infinite and its parameter would never move again."""
    train = optloss.optimize_loss(lambda p, x: jnp.sum(p["w"] * x), 0, 0.1, "Adam")
    state = train.init({"w": jnp.zeros(2)})
    state, _ = train.update(state, jnp.asarray([1e20, 1.0]))
    assert int(state.opt_states["OptimizeLoss"].nonfinite_steps) == 1
    state, _ = train.update(state, jnp.ones(2))
    np.testing.assert_allclose(state.params["w"], -0.1, rtol=1e-5)


def test_an_update_that_overflows_is_skipped() -> None:
    train = optloss.optimize_loss(lambda p: jnp.sum(p["w"]) * 1e30, 0, 1e30, "SGD")
    state, _ = train.update(train.init({"w": jnp.ones(2)}))
    np.testing.assert_array_equal(state.params["w"], 1.0)
    assert int(state.opt_states["OptimizeLoss"].nonfinite_steps) == 1


def test_the_transformation_skips_bad_gradients_too() -> None:
    optimizer = optloss.transformation(0, 0.1, "Adam", clip_gradients=1.0)
    params = {"w": jnp.asarray([1.0, -0.0])}
    first = optimizer.init(params)
    updates, state = optimizer.update({"w": jnp.asarray([np.nan, 1.0])}, first, params)
    new = optax.apply_updates(params, updates)
    assert np.asarray(new["w"]).tobytes() == np.asarray(params["w"]).tobytes()
    assert int(state.opt_state.nonfinite_steps) == 1
    assert int(state.global_step) == 0
    _, state = optimizer.update({"w": jnp.ones(2)}, state, params, value=jnp.nan)
    assert int(state.opt_state.nonfinite_steps) == 2
    assert jax.tree.structure(state) == jax.tree.structure(first)


def test_a_parameter_that_would_overflow_is_left_as_it_was() -> None:
    """3e38 - (-1e38) is beyond float32, though the update is not."""
    train = optloss.optimize_loss(lambda p: -1e38 * jnp.sum(p["w"] / 3e38) * 3e38, 0, 1.0, "SGD")
    state, _ = train.update(train.init({"w": jnp.full(2, 3e38)}))
    np.testing.assert_array_equal(state.params["w"], np.float32(3e38))
    assert int(state.opt_states["OptimizeLoss"].nonfinite_steps) == 1


# ---- both faces ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_transformation_takes_the_steps_of_optimize_loss() -> None:
    settings = {
        "global_step": 3,
        "learning_rate": 0.05,
        "optimizer": "RMSProp",
        "gradient_noise_scale": 0.1,
        "gradient_multipliers": {"a": 0.5},
        "clip_gradients": optloss.adaptive_clipping_fn(global_step=True),
        "learning_rate_decay_fn": lambda rate, step: optloss.cosine_decay(rate, step, 20),
        "variables": ["a", "b"],
        "key": 4,
    }

    def loss(params: Any) -> jax.Array:
        return jnp.sum(params["a"] ** 2) + jnp.sum(jnp.sin(params["b"])) + jnp.sum(params["frozen"])

    params = {"a": jnp.linspace(-1.0, 1.0, 4), "b": jnp.ones((2, 2)), "frozen": jnp.ones(2)}
    train = optloss.optimize_loss(loss, **settings)
    state, optimizer = train.init(params), optloss.transformation(**settings)
    opt_state = optimizer.init(params)
    for _ in range(10):
        state, out = train.update(state)
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert int(opt_state.global_step) == int(state.global_step) == 13
    for tag, value in opt_state.summaries.items():
        np.testing.assert_allclose(value, out.summaries[tag], rtol=1e-6)


def test_the_stages_chained_by_hand_are_the_pipeline() -> None:
    """Each stage in `optax.chain`; the noise has the key that the op has."""

    def decay(rate: Any, step: Any) -> Any:
        return optloss.inverse_time_decay(rate, step, 5, 0.5)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(params["a"] ** 2) + jnp.sum(jnp.sin(params["b"]))

    params = {"a": jnp.linspace(-1.0, 1.0, 4), "b": jnp.ones((2, 2))}
    train = optloss.optimize_loss(
        loss, 0, 0.1, "SGD", 0.1, {"a": 0.5}, optloss.adaptive_clipping_fn(global_step=True), decay, key=4
    )
    state = train.init(params)
    chain = optax.chain(
        optloss.add_gradient_noise(0.1, np.asarray(state.opt_states["OptimizeLoss"].noise.key)),
        optloss.multiply_gradients({"a": 0.5}),
        optloss.adaptive_clipping_fn(global_step=True),
        optloss.scale_by_decayed_learning_rate(0.1, decay),
    )
    chain_state = chain.init(params)
    for _ in range(5):
        state, _ = train.update(state)
        updates, chain_state = chain.update(jax.grad(loss)(params), chain_state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ---- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pmap_with_an_axis_name_averages_and_keeps_replicas_equal() -> None:
    """Eight shards of one batch give the step of the whole batch, with noise on."""

    def loss(params: Any, x: jax.Array) -> Any:
        return jnp.mean((params["w"] @ x.T) ** 2), {"mean": jnp.mean(x)}

    settings = {"gradient_noise_scale": 0.1, "clip_gradients": 1.0, "has_aux": True}
    one = optloss.optimize_loss(loss, 0, 0.1, "Adam", **settings)
    many = optloss.optimize_loss(loss, 0, 0.1, "Adam", axis_name="replica", **settings)
    params, x = {"w": jnp.linspace(-1.0, 1.0, 6)}, jax.random.normal(jax.random.key(0), (16, 6))
    state, replicas = one.init(params, key=0), many.init(params, key=0)
    replicas = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), replicas)
    step = jax.pmap(many.update, axis_name="replica")
    for _ in range(3):
        state, out = one.update(state, x)
        replicas, outs = step(replicas, x.reshape(8, 2, 6))
    weights = np.asarray(replicas.params["w"])
    assert all(weights[i].tobytes() == weights[0].tobytes() for i in range(8))
    np.testing.assert_allclose(weights[0], state.params["w"], rtol=1e-5)
    np.testing.assert_allclose(outs.loss, out.loss, rtol=1e-5)
    np.testing.assert_allclose(outs.aux["mean"], out.aux["mean"], rtol=1e-5)


@pytest.mark.parametrize("colocates", [True, False])
def test_colocate_gradients_with_ops_holds_gradients_to_their_parameters_sharding(colocates: bool) -> None:
    """The program has the constraint for the sharded parameter alone, and the step is the same."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jax.device_put(np.ones((64, 16), np.float32), parts)}
    batch = jax.device_put(np.ones((32, 64), np.float32) / 64, parts)
    train = optloss.optimize_loss(
        lambda p, x: jnp.mean((x @ p["w"]) ** 2), 0, 0.1, "Adam", colocate_gradients_with_ops=colocates
    )
    state = train.init(params)
    held = [e.params["sharding"].spec for e in constraints(jax.make_jaxpr(lambda: train.update(state, batch))().jaxpr)]
    assert held == ([jax.sharding.PartitionSpec("x")] if colocates else [])
    state, _ = train.update(state, batch)
    assert state.params["w"].sharding.is_equivalent_to(parts, 2)
    assert state.opt_states["OptimizeLoss"].optimizer.m["w"].sharding.is_equivalent_to(parts, 2)
    np.testing.assert_allclose(state.params["w"], 0.9, rtol=1e-4)  # epsilon is 2e-5 of these gradients


@pytest.mark.parametrize(("devices", "spec"), [(8, ("x", None)), (8, (("x",),)), (1, ("x",)), (1, (None, "x"))])
def test_colocate_gradients_with_ops_traces_once_however_the_sharding_is_spelt(devices: int, spec: Any) -> None:
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    traces = []

    def loss(params: Any) -> jax.Array:
        traces.append(1)
        return jnp.sum(params["w"] ** 2)

    train = optloss.optimize_loss(loss, 0, 0.1, "Adam", colocate_gradients_with_ops=True)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    state = train.init({"w": jax.device_put(np.ones((8, 16), np.float32), sharding)})
    for _ in range(3):
        state, _ = train.update(state)
    assert len(traces) == 1
    assert "sharding" in train.update.lower(state).as_text()


@pytest.mark.parametrize("colocates", [True, False])
def test_updates_of_the_transformation_lie_as_their_parameters_do_where_that_is_asked_for(colocates: bool) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    parts, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)) for spec in (("x",), ()))
    params = jax.device_put({"w": np.ones((16, 4), np.float32)}, parts)
    optimizer = optloss.transformation(None, 0.5, "SGD", colocate_gradients_with_ops=colocates)
    gradients = jax.device_put({"w": np.full((16, 4), 2.0, np.float32)}, whole)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    assert updates["w"].sharding.is_equivalent_to(parts if colocates else whole, 2)
    np.testing.assert_array_equal(updates["w"], -1.0)


@pytest.mark.parametrize(("nonfinite", "steps", "update"), [("apply", 1, np.nan), ("skip", 0, 0.0)])
def test_the_transformation_applies_what_is_not_finite_where_that_is_asked_for(
    nonfinite: str, steps: int, update: float
) -> None:
    optimizer, params = optloss.transformation(0, 0.5, "SGD", nonfinite=nonfinite), {"w": jnp.ones(2)}
    updates, state = optimizer.update({"w": jnp.array([1.0, np.nan])}, optimizer.init(params), params)
    assert (int(state.global_step), int(state.opt_state.nonfinite_steps)) == (steps, 1)
    np.testing.assert_array_equal(updates["w"][1], update)


def constraints(jaxpr: Any) -> list[Any]:
    """The sharding constraints of a program and of the programs in it."""
    inner = [value.jaxpr for e in jaxpr.eqns for value in e.params.values() if hasattr(value, "jaxpr")]
    here = [e for e in jaxpr.eqns if e.primitive.name == "sharding_constraint"]
    return here + [e for program in inner for e in constraints(program)]
