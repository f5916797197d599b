"""What does not fit together: transformations, states, gradients and parameters; each is told by its name."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_bad_input import INF, NAN, PARAMS, build, without_address

import optloss


def assert_named(error: BaseException, argument: str, shown: str = "") -> None:
    """The message begins with the argument, shows what came, fits a screen, and has nothing of JAX's inside."""
    message = str(error)
    assert re.match(rf"{argument}\b", message), message[:300]
    assert shown in message, message[:300]
    assert len(message) < 1000
    assert len(message.splitlines()) <= 12
    assert not [inside for inside in ("jax/_src", "DynamicJaxprTracer", "Traceback", "----") if inside in message]


def made(update: Any, init: Any = lambda params: ()) -> optax.GradientTransformation:
    return optax.GradientTransformation(init, update)


def divides_by_zero(*_: Any) -> Any:
    return 1 / 0


def scalars(updates: Any, state: Any, params: Any = None) -> Any:
    return jax.tree.map(jnp.sum, updates), state


class NoRepr:
    """Its repr fails."""

    def __repr__(self) -> str:  # noqa: D105
        raise RuntimeError("no repr")


LONG = "x" * 5000
ALONE = ["learning_rate", "optimizer", "clip_gradients", "gradient_noise_scale", "global_step", "loss", "nonfinite"]
ALONE += ["key", "param_specs", "update_ops", "variables"]
BAD_TRANSFORMATIONS: list[tuple[Any, str]] = [
    (optax.masked(optax.sgd(0.1), {"v": True}), "pytree"),
    (made(None, None), "NoneType"),
    (made(lambda u, s, p=None: (u, s), divides_by_zero), "ZeroDivision"),
    (made(divides_by_zero), "ZeroDivision"),
    (made(lambda u, s, p=None: u), "dict"),
    (made(lambda u, s, p=None: ({}, s)), "nothing"),
    (made(lambda u, s, p=None: (None, s)), "nothing"),
    (made(scalars), "(2, 3)"),  # it would broadcast
]
MISFITS: list[tuple[dict[str, Any], str]] = [
    *(({argument: LONG}, "xxx") for argument in ALONE),
    *(({"optimizer": bad}, shown) for bad, shown in BAD_TRANSFORMATIONS),
    *(({"clip_gradients": bad}, shown) for bad, shown in BAD_TRANSFORMATIONS),
    ({"learning_rate": list(range(10_000))}, "[0, 1"),
    ({"gradient_multipliers": {LONG: 1.0}}, "xxx"),
    ({"gradient_multipliers": {"w": LONG}}, "xxx"),
    ({"gradient_multipliers": {"w": np.array(["a"])}}, "'a'"),
    ({"gradient_multipliers": {"w": np.array([1j])}}, "1.j"),
    ({"gradient_multipliers": {"w": np.array([True, False, True])}}, "True"),
    ({"gradient_multipliers": {"w": lambda step: 1j}}, "complex"),
    ({"gradient_noise_scale": lambda step: 1j, "key": 0}, "complex"),
    ({"summaries": [LONG]}, "xxx"),
    ({"summaries": b"loss"}, "b'loss'"),
    ({"name": [LONG]}, "xxx"),
    ({"optimizer": int}, "int"),
    ({"optimizer": lambda rate: 1 / 0}, f"({__file__}:"),
    ({"optimizer": optax.chain}, "chain"),
    ({"clip_gradients": divides_by_zero}, "ZeroDivision"),
    ({"clip_gradients": lambda pairs: [(g * 1j, p) for g, p in pairs]}, "complex"),
    ({"clip_gradients": lambda pairs: [(g > 0, p) for g, p in pairs]}, "bool"),
    ({"clip_gradients": NoRepr()}, "NoRepr"),
    ({"key": np.array(-1)}, "-1"),
    ({"key": jnp.int32(-1)}, "-1"),
    ({"variables": divides_by_zero}, "ZeroDivision"),
    ({"variables": lambda: True}, "takes ()"),
    ({"variables": lambda name: "False"}, "'False'"),
    ({"variables": lambda name: np.array([True, False])}, "array"),
    ({"axis_name": 0}, "0"),
    ({"axis_name": True}, "True"),
    ({"axis_name": 1.5}, "1.5"),
    ({"axis_name": ""}, "''"),
    ({"learning_rate": 0, "optimizer": "Ftrl"}, "0"),
    ({"learning_rate": 1e39}, "1e+39"),
    ({"learning_rate_decay_fn": lambda rate, step: rate.foo}, "foo"),
    ({"loss": lambda p, x: jax.lax.stop_gradient(jnp.sum(p["w"]))}, "does not depend"),
    ({"loss": lambda p, x: jnp.sum(jnp.round(p["w"]))}, "does not depend"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "shown"), MISFITS, ids=lambda value: next(iter(value), ""))
def test_a_setting_that_does_not_fit_is_named(settings: dict[str, Any], shown: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        build(**settings).init(PARAMS, 1.0)
    assert_named(caught.value, next(iter(settings)), shown)


@pytest.mark.parametrize("optimizer", ["SGD", "Momentum", "Adagrad", "RMSProp", "Adam"])
@pytest.mark.parametrize("bad", [-INF, INF, NAN, -3e38])
def test_a_rate_that_would_overflow_is_skipped_whatever_its_sign(optimizer: str, bad: float) -> None:
    train = build(
        loss=lambda p: 1e5 * jnp.sum(p["w"] ** 2),
        optimizer=optimizer,
        learning_rate_decay_fn=lambda rate, step: jnp.float32(bad),
    )
    state, _ = train.update(train.init(PARAMS))
    np.testing.assert_array_equal(state.params["w"], 1.0)
    assert int(state.opt_states["OptimizeLoss"].nonfinite_steps) == 1


# ---- gradients and states --------------------------------------------------------------------------------------------

TWO = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("gradients", "shown"),
    [
        ({"a": np.ones(2)}, "'b'"),
        ({**TWO, "c": np.ones(1)}, "'c'"),
        ({"a": np.ones(2), "b": None}, "'b'"),
        ({"a": np.ones(2), "b": np.ones(1)}, "'b'"),
        ({"a": np.ones(2), "b": np.ones((4, 3))}, "'b'"),
        ({"a": np.ones(2), "b": np.ones(3, int)}, "'b' is int"),
        ({"a": np.ones(2), "b": np.ones(3, complex)}, "'b' is complex"),
        ({"a": np.ones(2), "b": np.zeros(3, jax.dtypes.float0)}, "'b'"),
    ],
    ids=str,
)
def test_gradients_that_are_not_the_parameters_are_named(gradients: Any, shown: str) -> None:
    stage = optloss.transformation(0, 0.1, "Adam", clip_gradients=1.0)
    with pytest.raises((ValueError, TypeError)) as caught:
        stage.update(gradients, stage.init(TWO), TWO)
    assert_named(caught.value, "updates", shown)


def test_gradients_of_what_is_frozen_may_be_missing() -> None:
    stage = optloss.transformation(0, 0.1, "SGD", variables="a")
    updates, _ = stage.update({"a": jnp.ones(2), "b": None}, stage.init(TWO), TWO)
    np.testing.assert_allclose(updates["a"], -0.1, rtol=1e-6)
    assert updates["b"] is None


def quadratic(params: Any, x: Any = 1.0) -> jax.Array:
    return x * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "params",
    [{**TWO, "b": np.ones((4, 3))}, {**TWO, "b": np.ones(1)}, {**TWO, "c": np.ones(1)}, {"a": np.ones(2)}],
    ids=str,
)
def test_a_state_for_other_parameters_is_named(params: Any) -> None:
    train = build(loss=quadratic, optimizer="Adam")
    with pytest.raises(ValueError, match="state: optimizer, 'm/") as caught:
        train.update(train.init(TWO)._replace(params=jax.tree.map(jnp.asarray, params)))
    assert_named(caught.value, "state")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"optimizer": "Adam"}, {"optimizer": "SGD"}),
        ({"optimizer": "SGD"}, {"optimizer": "Adam"}),
        ({"optimizer": "Momentum"}, {"optimizer": "Adagrad"}),
        ({"optimizer": "Adam"}, {"optimizer": "RMSProp"}),
        ({}, {"gradient_noise_scale": 0.1}),
        ({}, {"clip_gradients": optloss.adaptive_clipping_fn()}),
        ({"optimizer": "Adam", "variables": ["a"]}, {"optimizer": "Adam"}),
        ({"global_step": None}, {"learning_rate_decay_fn": lambda rate, step: rate}),
    ],
    ids=without_address,
)
def test_a_state_of_other_settings_is_named(one: Any, other: Any) -> None:
    state = build(loss=quadratic, **one).init(TWO)
    with pytest.raises(ValueError, match="^state: ") as caught:
        build(loss=quadratic, **other).update(state)
    assert_named(caught.value, "state")


def test_a_state_of_something_else_is_named() -> None:
    stage = optloss.transformation(0, 0.1, "Adam")
    with pytest.raises(TypeError, match="^state: got tuple; the TransformationState"):
        stage.update(TWO, optax.sgd(0.1).init(TWO), TWO)
    with pytest.raises(TypeError, match="^state: got tuple for an OptState; what init or update gave would do"):
        stage.update(TWO, stage.init(TWO)._replace(opt_state=()), TWO)


def deleted() -> Any:
    array = jnp.ones(2)
    array.delete()
    return array


@pytest.mark.parametrize("leaf", [np.zeros(2, jax.dtypes.float0), 2**70, "a", deleted])
def test_a_parameter_that_is_no_array_of_numbers_is_named(leaf: Any) -> None:
    with pytest.raises(TypeError) as caught:
        build().init({"w": np.ones(2, np.float32), "other": leaf() if callable(leaf) else leaf})
    assert_named(caught.value, "params", "among the leaves")


def test_an_op_does_not_join_a_state_that_was_given_away() -> None:
    train = build()
    state = train.init(PARAMS)
    train.update(state)
    with pytest.raises(ValueError, match="^state: it was given to an update before"):
        build(name="other").init(state)


def test_explain_names_what_is_no_shape() -> None:
    with pytest.raises(TypeError, match="^params: got 'a' of type str among the leaves"):
        build().explain({"w": "a"})


def test_a_key_is_looked_at_where_there_is_no_noise_too() -> None:
    with pytest.raises(TypeError, match="^key: got 'a'"):
        build().init(PARAMS, key="a")


STAGES: list[tuple[str, Callable[[], Any]]] = [
    ("use_nesterov", lambda: optloss.momentum(0.1, 0.9, "no")),  # type: ignore[arg-type]
    ("centered", lambda: optloss.rmsprop(0.1, centered="no")),  # type: ignore[arg-type]
    ("staircase", lambda: optloss.exponential_decay(0.1, 5, 10, 0.5, staircase="False")),  # type: ignore[arg-type]
    ("cycle", lambda: optloss.polynomial_decay(0.1, 5, 10, cycle="no")),  # type: ignore[arg-type]
    ("learning_rate", lambda: optloss.exponential_decay(None, 5, 10, 0.5)),  # type: ignore[arg-type]
    ("learning_rate", lambda: optloss.exponential_decay("0.1", 5, 10, 0.5)),  # type: ignore[arg-type]
    ("global_step", lambda: optloss.exponential_decay(0.1, "5", 10, 0.5)),  # type: ignore[arg-type]
    ("boundaries", lambda: optloss.piecewise_constant(1, None, [1.0])),  # type: ignore[arg-type]
    ("key", lambda: optloss.noisy_linear_cosine_decay(0.1, 5, 10, key="a")),  # type: ignore[arg-type]
    ("variance_decay", lambda: optloss.noisy_linear_cosine_decay(0.1, 5, 10, variance_decay=-1.0)),
]


@pytest.mark.parametrize(("argument", "call"), STAGES, ids=without_address)
def test_an_argument_of_a_stage_or_a_decay_is_named(argument: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert_named(caught.value, argument)


def test_an_error_in_the_loss_tells_what_it_was_called_with() -> None:
    with pytest.raises(KeyError) as caught:
        build(loss=lambda params, x: jnp.sum(params["v"])).init(PARAMS, 1.0)
    assert any("loss: " in note and "float32[2,3]" in note for note in caught.value.__notes__)


def test_explain_warns_of_averages_that_never_move() -> None:
    (warning,) = build(clip_gradients=optloss.adaptive_clipping_fn(decay=1.0)).explain(PARAMS).warnings
    assert warning == "clip_gradients: decay=1 without global_step never moves the averages."
    assert (
        build(clip_gradients=optloss.adaptive_clipping_fn(decay=1.0, global_step=True)).explain(PARAMS).warnings == ()
    )
