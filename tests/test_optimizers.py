"""The six optimizers against Optax's exact twins, and the forms in which one may be given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss

TWINS = {
    "sgd": (optloss.sgd(0.1), optax.sgd(0.1)),
    "momentum": (optloss.momentum(0.1, 0.9), optax.sgd(0.1, momentum=0.9)),
    "nesterov": (optloss.momentum(0.1, 0.9, use_nesterov=True), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "rmsprop": (optloss.rmsprop(0.1), optax.rmsprop(0.1, decay=0.9, eps=1e-10, initial_scale=1.0)),
    "rmsprop_momentum": (
        optloss.rmsprop(0.1, momentum=0.5),
        optax.rmsprop(0.1, decay=0.9, eps=1e-10, initial_scale=1.0, momentum=0.5),
    ),
    "rmsprop_centered": (
        optloss.rmsprop(0.1, centered=True),
        optax.rmsprop(0.1, decay=0.9, eps=1e-10, initial_scale=1.0, centered=True),
    ),
    "adagrad": (optloss.adagrad(0.1), optax.adagrad(0.1, eps=0.0)),
}
EXACT = {"sgd", "momentum"}  # the same operations in the same order


@pytest.mark.parametrize("name", sorted(TWINS))
def test_an_optimizer_equals_its_twin_in_optax(name: str) -> None:
    ours, twin = TWINS[name]
    params = {"w": jnp.linspace(-1.0, 1.0, 50), "b": jnp.ones((3, 4))}
    state, twin_state = ours.init(params), twin.init(params)
    for i in range(20):
        gradients = jax.tree.map(lambda x, i=i: jnp.sin(x * 3 + i), params)
        updates, state = ours.update(gradients, state, params)
        twin_updates, twin_state = twin.update(gradients, twin_state, params)
        for got, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(twin_updates), strict=True):
            np.testing.assert_allclose(
                got, expected, rtol=0 if name in EXACT else 2e-6, atol=0 if name in EXACT else 1e-7
            )


def test_adam_differs_from_optax_by_the_place_of_epsilon() -> None:
    """At a first gradient of 1e-6 and a rate of 1e-3: TF1 -7.6e-4, Optax -9.9e-4."""
    params, gradients = {"w": jnp.zeros(1)}, {"w": jnp.full(1, 1e-6)}
    ours, twin = optloss.adam(1e-3), optax.adam(1e-3)
    assert float(ours.update(gradients, ours.init(params))[0]["w"][0]) == pytest.approx(-7.6e-4, rel=1e-2)
    assert float(twin.update(gradients, twin.init(params))[0]["w"][0]) == pytest.approx(-9.9e-4, rel=1e-2)


@pytest.mark.parametrize(("gradient", "times"), [(1.0, 3.16), (0.1, 30.0)])
def test_rmsprop_differs_from_optax_defaults_by_where_the_average_starts(gradient: float, times: float) -> None:
    """Averages after one step: 0.9 + 0.1 * g**2 here, 0.1 * g**2 there."""
    gradients, first = {"w": jnp.full(1, gradient)}, []
    for optimizer in (optloss.rmsprop(0.1), optax.rmsprop(0.1)):
        first.append(float(optimizer.update(gradients, optimizer.init(gradients))[0]["w"][0]))
    assert first[1] / first[0] == pytest.approx(times, rel=2e-2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", sorted(optloss.OPTIMIZER_CLS_NAMES))
def test_sixteen_bit_parameters_follow_float32_ones_through_zero_gradients(name: str, dtype: Any) -> None:
    """In TF1 float16 Adam made NaN of a zero gradient, and bfloat16 Adam exploded at its second step."""
    optimizer = optloss.OPTIMIZER_CLS_NAMES[name](0.01)
    small, full = ({"w": jnp.asarray([1.0, -2.0, 0.5], d)} for d in (dtype, jnp.float32))
    state, full_state = optimizer.init(small), optimizer.init(full)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype(jnp.float32)}
    for i in range(5):
        gradient = jnp.asarray([0.0, 1e-3 * i, 0.25], dtype)
        updates, state = optimizer.update({"w": gradient}, state, small)
        full_updates, full_state = optimizer.update({"w": gradient.astype(jnp.float32)}, full_state, full)
        assert updates["w"].dtype == dtype
        # Rounding to 16 bits alone: 2**-8 for bfloat16, 2**-10 and denormals of 6e-8 for float16.
        np.testing.assert_allclose(updates["w"].astype(jnp.float32), full_updates["w"], rtol=2**-8, atol=1e-7)


def test_adam_slots_move_by_gradients_that_bfloat16_slots_would_lose() -> None:
    """1000 gradients of 1: v reaches 1 - 0.999**1000 = 0.6323. In bfloat16, 1 - beta2 is 0 and v stays there."""
    optimizer, params = optloss.adam(0.01), {"w": jnp.ones(1, jnp.bfloat16)}
    state = optimizer.init(params)

    def step(state: Any, _: None) -> tuple[Any, None]:
        return optimizer.update({"w": jnp.ones(1, jnp.bfloat16)}, state)[1], None

    state, _ = jax.lax.scan(step, state, None, length=1000)
    assert float(state.v["w"][0]) == pytest.approx(0.6323, rel=1e-3)


def test_a_schedule_gives_the_rate_of_each_step() -> None:
    optimizer = optloss.sgd(lambda step: 0.5**step)
    state = optimizer.init({"w": jnp.zeros(())})
    got = []
    for _ in range(3):
        updates, state = optimizer.update({"w": jnp.ones(())}, state)
        got.append(float(updates["w"]))
    assert got == [-1.0, -0.5, -0.25]


def test_ftrl_with_l1_makes_weights_exactly_zero() -> None:
    train = optloss.optimize_loss(
        lambda w: jnp.sum((w - jnp.asarray([1e-3, 2.0])) ** 2),
        0,
        0.1,
        lambda rate: optloss.ftrl(rate, l1_regularization_strength=0.5),
    )
    state = train.init(jnp.zeros(2))
    for _ in range(100):
        state, _ = train.update(state)
    assert float(state.params[0]) == 0.0
    assert float(state.params[1]) > 1.0


def quadratic(params: Any) -> jax.Array:
    return jnp.sum((params["w"] - 3.0) ** 2) + jnp.sum(params["m"] ** 2)


def loss_after(optimizer: Any, learning_rate: Any, steps: int = 30, **settings: Any) -> float:
    train = optloss.optimize_loss(quadratic, 0, learning_rate, optimizer, **settings)
    state = train.init({"w": jnp.zeros(4), "m": jnp.ones((3, 2))})
    for _ in range(steps):
        state, out = train.update(state)
    return float(out.loss)


ALIASES = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "amsgrad",
    "fromage",
    "lamb",
    "lars",
    "lbfgs",
    "lion",
    "nadam",
    "nadamw",
    "novograd",
    "optimistic_gradient_descent",
    "polyak_sgd",
    "radam",
    "rprop",
    "sign_sgd",
    "sm3",
    "yogi",
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "lbfgs" else n for n in ALIASES])
def test_an_optax_name_is_optax_function_of_the_rate(name: str) -> None:
    got = loss_after(name, 0.01, steps=5)
    assert got == pytest.approx(loss_after(getattr(optax, name), 0.01, steps=5), rel=1e-6)
    assert got < 42.0  # the loss before the first step


@pytest.mark.parametrize(
    ("optimizer", "learning_rate"),
    [
        (optax.lbfgs(), None),
        (optax.lbfgs, None),
        (optax.polyak_sgd(), None),
        (lambda rate: optax.chain(optax.sgd(rate), optax.contrib.reduce_on_plateau(patience=2)), 0.1),
    ],
    ids=["lbfgs", "lbfgs_uncalled", "polyak_sgd", "reduce_on_plateau"],
)
@pytest.mark.parametrize("variables", [None, ["w"]])
def test_an_optimizer_that_wants_more_than_gradients_is_given_it(
    optimizer: Any, learning_rate: Any, variables: Any
) -> None:
    """What is left when only w is trained is the 6 of m."""
    left = 0.0 if variables is None else 6.0
    assert loss_after(optimizer, learning_rate, variables=variables) == pytest.approx(left, abs=0.01)


@pytest.mark.slow
def test_the_transformation_hands_value_and_value_fn_on() -> None:
    optimizer = optloss.transformation(0, None, optax.lbfgs(), variables=["w"])
    params = {"w": jnp.zeros(4), "m": jnp.ones((3, 2))}
    state = optimizer.init(params)
    for _ in range(5):
        value, gradients = jax.value_and_grad(quadratic)(params)
        updates, state = optimizer.update(gradients, state, params, value=value, grad=gradients, value_fn=quadratic)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], 3.0, rtol=1e-5)
    np.testing.assert_array_equal(params["m"], 1.0)


BAD = [
    (optloss.sgd, ("0.1",), ValueError, "learning_rate: got '0.1'"),
    (optloss.sgd, (None,), ValueError, "learning_rate: got None"),
    (optloss.adam, (0.1, 1.0), ValueError, "beta1: got 1"),
    (optloss.adam, (0.1, 0.9, 1.5), ValueError, "beta2: got 1.5"),
    (optloss.adam, (0.1, 0.9, 0.99, -1.0), ValueError, "epsilon: got -1.0"),
    (optloss.momentum, (0.1, -0.9), ValueError, "momentum: got -0.9"),
    (optloss.adagrad, (0.1, 0.0), ValueError, "initial_accumulator_value: got 0.0"),
    (optloss.rmsprop, (0.1, 1.1), ValueError, "decay: got 1.1"),
    (optloss.ftrl, (0.1, 0.5), ValueError, "learning_rate_power: got 0.5; a finite number <= 0"),
    (optloss.ftrl, (0.1, -0.5, -0.1), ValueError, "initial_accumulator_value: got -0.1"),
    (optloss.ftrl, (0.1, -0.5, 0.1, -1), ValueError, "l1_regularization_strength: got -1"),
    (optloss.ftrl, (0.1, -0.5, 0.1, 0, -1), ValueError, "l2_regularization_strength: got -1"),
    (optloss.ftrl, (0.1, -0.5, 0.1, 0, 0, -1), ValueError, "l2_shrinkage_regularization_strength: got -1"),
    (optloss.ftrl, (0,), ValueError, "learning_rate: got 0, by which Ftrl divides"),
]


@pytest.mark.parametrize(("function", "args", "error", "message"), BAD)
def test_a_bad_setting_is_an_error_that_names_it(function: Any, args: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        function(*args)


def test_ftrl_without_parameters_says_that_it_needs_them() -> None:
    optimizer = optloss.ftrl(0.1)
    with pytest.raises(ValueError, match="^params: got None"):
        optimizer.update({"w": jnp.ones(1)}, optimizer.init({"w": jnp.ones(1)}))
