"""The faults of settings, losses, batches and parameters, one by one and at random, and what comes of each.

`fault_rows_settings.py` names the tests of each fault; faults that tests of other files show are not shown here again.
"""

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fault_rows_settings import SETTINGS
from test_bad_input import (
    ADAPTIVE,
    ADAPTIVE_SETTINGS,
    AT_CONSTRUCTION,
    AT_INIT,
    INF,
    NAN,
    PARAMS,
    build,
    without_address,
)

import optloss

# ---- single bad settings: what `test_bad_input.py` has not -----------------------------------------------------------

# (settings, of which the first is bad; what the message shows of it)
MORE_AT_CONSTRUCTION: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": np.float32(NAN)}, "nan"),
    ({"learning_rate": jnp.float32(-1)}, "-1."),
    ({"learning_rate": jnp.complex64(1)}, "complex64"),
    ({"learning_rate": np.bool_(True)}, "True"),
    ({"learning_rate": np.array("0.1")}, "'0.1'"),
    ({"learning_rate": (0.1,)}, "(0.1,) of type tuple"),
    ({"learning_rate": b"0.1"}, "b'0.1' of type bytes"),
    ({"learning_rate": object()}, "of type object"),
    ({"learning_rate": optax.constant_schedule(0.1)}, "of type function"),
    ({"learning_rate": None, "optimizer": "adamw"}, "(adamw)"),
    ({"optimizer": object()}, "of type object"),
    ({"optimizer": "sgd"}, "'sgd'. Did you mean 'SGD'?"),
    ({"optimizer": "Adam "}, "'Adam '. Did you mean 'Adam'?"),
    ({"optimizer": "optax.adam"}, "'optax.adam'"),
    ({"optimizer": b"SGD"}, "b'SGD' of type bytes"),
    ({"optimizer": ("SGD",)}, "('SGD',) of type tuple"),
    ({"optimizer": True}, "True of type bool"),
    ({"optimizer": optax.GradientTransformation}, "GradientTransformation takes (init, update)"),
    ({"optimizer": lambda a, b: None}, "takes (a, b), not (learning_rate)"),
    ({"optimizer": optax.sgd, "learning_rate": None}, "sgd"),
    ({"gradient_noise_scale": INF}, "inf"),
    ({"gradient_noise_scale": -1}, "-1"),
    ({"gradient_noise_scale": np.float32(-1)}, "-1"),
    ({"gradient_noise_scale": True}, "True of type bool"),
    ({"gradient_noise_scale": 1j}, "1j of type complex"),
    ({"gradient_noise_scale": [0.1]}, "[0.1] of type list"),
    ({"gradient_noise_scale": {}}, "{} of type dict"),
    ({"gradient_noise_scale": np.ones(2)}, "shape (2,)"),
    ({"gradient_noise_scale": lambda: 1.0}, "takes (), not (global_step)"),
    ({"gradient_noise_scale": lambda step: None}, "None"),
    ({"gradient_noise_scale": lambda step: "0.1"}, "'str'"),
    ({"gradient_noise_scale": lambda step: 1 / 0}, "ZeroDivisionError"),
    ({"gradient_noise_scale": lambda step: 1.0 if step > 3 else 0.0}, "boolean conversion"),
    ({"key": "0"}, "'0' of type str"),
    ({"key": True}, "True of type bool"),
    ({"key": [0, 1]}, "[0, 1] of type list"),
    ({"key": 2**70}, str(2**70)),
    ({"key": np.int32(-1)}, "-1"),
    ({"key": np.float32(1)}, "float32"),
    ({"key": np.zeros(3, np.uint32)}, "uint32 of shape (3,)"),
    ({"key": np.zeros(2, np.int32)}, "int32 of shape (2,)"),
    ({"key": jax.random.split(jax.random.key(0), 4)}, "of shape (4,); an integer, one typed key"),
    ({"noise_generator": "rbg"}, "'rbg'"),
    ({"noise_generator": None}, "None"),
    ({"gradient_multipliers": "w"}, "'w' of type str"),
    ({"gradient_multipliers": 2.0}, "2.0 of type float"),
    ({"gradient_multipliers": [("w", 1.0)]}, "[('w', 1.0)] of type list"),
    ({"gradient_multipliers": lambda name: 1.0}, "of type function"),
    ({"gradient_multipliers": {b"w": 1.0}}, "b'w'"),
    ({"gradient_multipliers": {("w",): 1.0}}, "('w',)"),
    ({"gradient_multipliers": {"w": True}}, "True of type bool"),
    ({"gradient_multipliers": {"w": 1j}}, "1j of type complex"),
    ({"gradient_multipliers": {"w": INF}}, "inf"),
    ({"gradient_multipliers": {"w": [1.0, 2.0]}}, "[1.0, 2.0] of type list"),
    ({"gradient_multipliers": {"w": {}}}, "{} of type dict"),
    ({"gradient_multipliers": {"w": jnp.asarray([1, NAN])}}, "nan"),
    ({"gradient_multipliers": {"w": np.full((200, 300), NAN)}}, "nan"),
    ({"gradient_multipliers": {"w": lambda: 1.0}}, "takes (), not (global_step)"),
    ({"gradient_multipliers": {"w": lambda step: None}}, "None"),
    ({"gradient_multipliers": {"w": lambda step: True}}, "bool"),
    ({"gradient_multipliers": {"w": lambda step: 1 / 0}}, "ZeroDivisionError"),
    ({"clip_gradients": -1}, "-1"),
    ({"clip_gradients": -INF}, "-inf"),
    ({"clip_gradients": np.bool_(True)}, "True"),
    ({"clip_gradients": 1j}, "1j of type complex"),
    ({"clip_gradients": np.ones(1)}, "shape (1,)"),
    ({"clip_gradients": {}}, "{} of type dict"),
    ({"clip_gradients": object()}, "of type object"),
    ({"clip_gradients": optloss.clip_by_global_norm}, "clip_by_global_norm"),
    ({"clip_gradients": lambda a, b: a}, "takes (a, b), not (grads_and_vars)"),
    ({"learning_rate_decay_fn": "exponential"}, "'exponential'"),
    ({"learning_rate_decay_fn": optloss.exponential_decay(0.1, 0, 10, 0.5)}, "0.1"),
    ({"learning_rate_decay_fn": optloss.exponential_decay}, "exponential_decay"),
    ({"learning_rate_decay_fn": optax.exponential_decay(0.1, 10, 0.5)}, "takes (count)"),
    ({"learning_rate_decay_fn": lambda rate, step: "0.1"}, "'str'"),
    ({"learning_rate_decay_fn": lambda rate, step: 1j}, "complex64"),
    ({"learning_rate_decay_fn": lambda rate, step: True}, "bool"),
    ({"learning_rate_decay_fn": lambda rate, step: (rate, step)}, "float32"),
    ({"learning_rate_decay_fn": lambda rate, step: {}}, "{}"),
    ({"learning_rate_decay_fn": lambda rate, step: float(step)}, "int32[]"),
    ({"learning_rate_decay_fn": lambda rate, step: 1 / 0}, "ZeroDivisionError"),
    ({"learning_rate_decay_fn": lambda rate, step: optloss.cosine_decay(rate, step, 0)}, "decay_steps: got 0"),
    ({"update_ops": "ops"}, "'ops'"),
    ({"update_ops": {}}, "{}"),
    ({"update_ops": [None]}, "None"),
    ({"variables": 3}, "3"),
    ({"variables": b"w"}, "b'w'"),
    ({"variables": {"w"}}, "'w'"),
    ({"variables": ["w", True]}, "'w'"),
    ({"variables": {"w": 1.0, "n": 0.0}}, "0.0"),
    ({"variables": {"w": np.array([True, False])}}, "array([ True, False])"),
    ({"variables": {"w": None}}, "{'w': None}"),
    ({"name": b"net"}, "b'net' of type bytes"),
    ({"name": ["net"]}, "['net'] of type list"),
    ({"name": True}, "True of type bool"),
    ({"summaries": 3}, "3 of type int"),
    ({"summaries": True}, "True of type bool"),
    ({"summaries": {"loss": 1}}, "{'loss': 1} of type dict"),
    ({"summaries": ["los"]}, "'los'. Did you mean 'loss'?"),
    ({"summaries": [["loss"]]}, "['loss']"),
    ({"summaries": [""]}, "''"),
    ({"global_step": 1.5}, "1.5"),
    ({"global_step": NAN}, "nan"),
    ({"global_step": 1j}, "1j"),
    ({"global_step": [0]}, "[0]"),
    ({"global_step": {}}, "{}"),
    ({"global_step": np.float32(0)}, "0.0"),
    ({"global_step": jnp.int32(-1)}, "-1"),
    ({"global_step": lambda: 0}, "<function"),
    ({"colocate_gradients_with_ops": "yes"}, "'yes' of type str"),
    ({"increment_global_step": "False"}, "'False' of type str"),
    ({"increment_global_step": 0}, "0 of type int"),
    ({"has_aux": None}, "None of type NoneType"),
    ({"has_aux": 1}, "1 of type int"),
    ({"reproducible": "bits"}, "'bits' of type str"),
    ({"nonfinite": None}, "None"),
    ({"nonfinite": True}, "True"),
    ({"nonfinite": "Skip"}, "'Skip'. Did you mean 'skip'?"),
    ({"nonfinite": ["skip"]}, "['skip']"),
    ({"axis_name": {}}, "{}"),
    ({"axis_name": [[]]}, "[[]]"),
    ({"param_specs": "x"}, "'x' of type str"),
    ({"loss": "loss"}, "'loss' of type str"),
    ({"loss": object()}, "of type object"),
]

MORE_AT_INIT: list[tuple[dict[str, Any], str]] = [
    ({"variables": ""}, "''"),
    ({"variables": "kernel"}, "'kernel'"),
    ({"variables": ("W",)}, "'W'. Did you mean 'w'?"),
    ({"variables": ["w:0"]}, "'w:0'. Did you mean 'w'?"),
    ({"variables": ["False", "True"]}, "'False'"),
    ({"variables": [["w"]]}, "the tree of booleans is not the parameters' tree"),
    ({"variables": {"w": True}}, "the tree of booleans is not the parameters' tree"),
    ({"variables": {"v": True, "n": True}}, "the tree of booleans is not the parameters' tree"),
    ({"variables": "n"}, "'n'"),
    ({"variables": False}, "False"),
    ({"variables": lambda name: name == "weihgts"}, "No variables to optimize"),
    ({"gradient_multipliers": {"": 1.0}}, "''"),
    ({"gradient_multipliers": {"W": 1.0}}, "'W'. Did you mean 'w'?"),
    ({"gradient_multipliers": {"w/": 1.0}}, "'w/'. Did you mean 'w'?"),
    ({"gradient_multipliers": {"*": 2.0, "**": 3.0}}, "'*' and '**' both match"),
    ({"gradient_multipliers": {"w": np.ones((5, 2, 3))}}, "(5, 2, 3)"),
    ({"gradient_multipliers": {"w": lambda step: np.ones(2)}}, "(2,)"),
    ({"clip_gradients": lambda pairs: 5}, "returned int"),
    ({"clip_gradients": lambda pairs: [gradient for gradient, _ in pairs]}, "shapes [(3,)]"),
    ({"clip_gradients": lambda pairs: [(jnp.sum(g), p) for g, p in pairs]}, "shapes [()]"),
    ({"clip_gradients": lambda pairs: [(g[0], p) for g, p in pairs]}, "shapes [(3,)]"),
    ({"global_step": 2**70}, str(2**70)),
    ({"global_step": np.uint64(2**63)}, str(2**63)),
    ({"update_ops": [lambda: 1]}, "there is no model state"),
    ({"loss": lambda params, x: {}}, "returned {}"),
    ({"loss": lambda params, x: params}, "float32[2,3]"),
    ({"loss": lambda params, x: True}, "returned True"),
    ({"loss": lambda params, x: jnp.sum(params["w"]) > 0}, "returned bool[]"),
    ({"loss": lambda params, x: jnp.sum(params["w"]) * 1j}, "returned complex64[]"),
    ({"loss": lambda params, x: [jnp.sum(params["w"])]}, "float32[]"),
    ({"loss": lambda params, x: jnp.float32(3.0)}, "does not depend on ['w']"),
    ({"loss": lambda params, x: NAN}, "returned nan"),
    ({"loss": lambda params, x: (jnp.sum(params["w"]), 1, 2), "has_aux": True}, "(scalar, aux) would do"),
]

# (bad argument, function, arguments of the function, what the message shows)
IN_STAGES: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    ("std_factor", ADAPTIVE, (), {"std_factor": None}, "None"),
    ("std_factor", ADAPTIVE, (), {"std_factor": NAN}, "nan"),
    ("std_factor", ADAPTIVE, (), {"std_factor": [2.0]}, "[2.0]"),
    ("decay", ADAPTIVE, (), {"decay": -1}, "-1"),
    ("decay", ADAPTIVE, (), {"decay": 2}, "2"),
    ("decay", ADAPTIVE, (), {"decay": True}, "True of type bool"),
    ("static_max_norm", ADAPTIVE, (), {"static_max_norm": NAN}, "nan"),
    ("static_max_norm", ADAPTIVE, (), {"static_max_norm": "1"}, "'1' of type str"),
    ("static_max_norm", ADAPTIVE, (), {"static_max_norm": True}, "True of type bool"),
    ("global_step", ADAPTIVE, (), {"global_step": "yes"}, "'yes' of type str"),
    ("report_summary", ADAPTIVE, (), {"report_summary": None}, "None"),
    ("epsilon", ADAPTIVE, (), {"epsilon": INF}, "inf"),
    ("epsilon", ADAPTIVE, (), {"epsilon": -1e-8}, "-1e-08"),
    ("clip_norm", optloss.clip_by_global_norm, (-1.0,), {}, "-1.0"),
    ("scale", optloss.add_gradient_noise, (-0.1, 0), {}, "-0.1"),
    ("key", optloss.add_gradient_noise, (0.1, None), {}, "None"),
    ("generator", optloss.add_gradient_noise, (0.1, 0), {"generator": "rbg"}, "'rbg'"),
    ("decay_steps", optloss.exponential_decay, (0.1, 5, True, 0.5), {}, "True of type bool"),
    ("decay_rate", optloss.exponential_decay, (0.1, 5, 10, "0.5"), {}, "'0.5' of type str"),
    ("decay_steps", optloss.cosine_decay, (0.1, 5, INF), {}, "inf"),
    ("alpha", optloss.cosine_decay, (0.1, 5, 10, "a"), {}, "'a' of type str"),
    ("m_mul", optloss.cosine_decay_restarts, (0.1, 5, 10), {"m_mul": -1}, "-1"),
    ("boundaries", optloss.piecewise_constant, (1, [1, 1], [1.0, 2.0, 3.0]), {}, "[1, 1]"),
    ("schedule", optloss.from_schedule, (lambda: 1.0,), {}, "takes (), not (global_step)"),
]

# (bad argument, settings, arguments of `init`, what the message shows)
OF_INIT: list[tuple[str, dict[str, Any], tuple[Any, ...], dict[str, Any], str]] = [
    ("params", {}, ({},), {}, "without arrays"),
    ("params", {}, (None,), {}, "without arrays"),
    ("params", {}, ({"w": None},), {}, "without arrays"),
    ("params", {}, ("w",), {}, "'w' of type str"),
    ("params", {}, ({"w": np.array(["a"])},), {}, "['a']"),
    ("params", {}, ({"w": np.array([object()])},), {}, "of type ndarray"),
    ("params", {}, ({"w": len},), {}, "built-in function len"),
    ("params", {}, ({"w": np.ones(2, np.complex64)},), {}, "'w' is complex64"),
    ("variables", {}, ({"b": np.array([True])},), {}, "No variables to optimize"),
    ("key", {"gradient_noise_scale": 0.1}, (PARAMS,), {"key": "0"}, "'0' of type str"),
    ("key", {"gradient_noise_scale": 0.1}, (PARAMS,), {"key": -1}, "-1"),
    ("model_state", {}, (PARAMS,), {"model_state": object()}, "of type object"),
]


class Fault(NamedTuple):
    """One bad setting."""

    case: str
    call: Callable[[], Any]  # what must raise
    message: str  # what the message matches from its beginning


def build_and_init(settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    return build(**settings).init(*args, **kwargs)


def shows(argument: str, shown: str) -> str:
    return rf"{argument}\b(?s:.*){re.escape(shown)}"


def fault_of(settings: dict[str, Any], message: str, *, at_init: bool) -> Fault:
    case = ", ".join(f"{argument}={value!r}" for argument, value in settings.items())
    call = functools.partial(build_and_init, settings, PARAMS, 1.0) if at_init else functools.partial(build, **settings)
    return Fault(without_address(case), call, message)


FAULTS = [
    *(fault_of(settings, message, at_init=False) for settings, _, message in AT_CONSTRUCTION),
    *(fault_of(s, shows(next(iter(s)), shown), at_init=False) for s, shown in MORE_AT_CONSTRUCTION),
    *(fault_of(settings, message, at_init=True) for settings, _, message in AT_INIT),
    *(fault_of(s, shows(next(iter(s)), shown), at_init=True) for s, shown in MORE_AT_INIT),
    *(Fault(f"adaptive {s}", functools.partial(ADAPTIVE, **s), message) for s, _, message in ADAPTIVE_SETTINGS),
    *(
        Fault(
            f"{function.__name__} {argument}={shown}", functools.partial(function, *args, **kw), shows(argument, shown)
        )
        for argument, function, args, kw, shown in IN_STAGES
    ),
    *(
        Fault(
            without_address(f"init{args} {kw}"),
            functools.partial(build_and_init, s, *args, **kw),
            shows(argument, shown),
        )
        for argument, s, args, kw, shown in OF_INIT
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.case for fault in FAULTS])
def test_a_single_bad_setting_is_an_error_that_names_it_and_shows_what_came(fault: Fault) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        fault.call()
    message = str(caught.value)
    assert re.match(fault.message, message), message
    assert len(message) < 1000
    assert len(message.splitlines()) <= 12
    assert not [
        inner for inner in ("jax/_src", "JitTracer", "DynamicJaxprTracer", "Traceback", "----") if inner in message
    ]


def test_there_are_more_bad_settings_than_the_82_of_which_a_chain_names_six() -> None:
    assert len({fault.case for fault in FAULTS}) >= 82


@pytest.mark.parametrize("wrong", ["clip_gradient", "lr", "gradient_noise", "max_consecutive", "safe"])
def test_an_unknown_argument_is_a_type_error_at_construction_that_names_it(wrong: str) -> None:
    """From Python 3.13 on it says too which one was meant."""
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
        build(**{wrong: 1.0})


def test_the_error_of_a_function_says_where_the_function_stands() -> None:
    def decay(rate: Any, step: Any) -> Any:
        return rate if step > 3 else 0.0

    place = f"decay ({__file__}:{decay.__code__.co_firstlineno})"
    with pytest.raises(TypeError, match=f"^learning_rate_decay_fn: .*{re.escape(place)}"):
        build(learning_rate_decay_fn=decay)


# ---- several at once, at random --------------------------------------------------------------------------------------

VALID: dict[str, list[Any]] = {
    "global_step": [0, 7, np.int64(3)],
    "learning_rate": [0.1, 1, np.float32(0.01)],
    "optimizer": [*optloss.OPTIMIZER_CLS_NAMES, "adamw", optax.sgd, optloss.adam(0.1)],
    "gradient_noise_scale": [None, 0, 0.01, lambda step: 0.1],
    "gradient_multipliers": [None, {}, {"w": 0.5}, {"*": lambda step: 2.0}],
    "clip_gradients": [None, 1, ADAPTIVE(global_step=True), optax.clip(1.0), lambda pairs: pairs],
    "learning_rate_decay_fn": [None, lambda rate, step: optloss.inverse_time_decay(rate, step, 5, 0.5)],
    "update_ops": [None, []],
    "variables": [None, "w", {"w": True, "n": False}, lambda name: True],
    "name": [None, "net"],
    "summaries": [None, (), optloss.OPTIMIZER_SUMMARIES],
    "colocate_gradients_with_ops": [False, True],
    "increment_global_step": [True, False],
    "nonfinite": ["skip", "apply"],
    "key": [0, 2**64 - 1],
    "noise_generator": ["mixer", "threefry"],
    "reproducible": [False, True],
}

# Those that are faults whatever the others are.
ALWAYS_BAD = [
    settings
    for settings in [
        *(settings for settings, *_ in AT_CONSTRUCTION + AT_INIT),
        *(settings for settings, *_ in MORE_AT_CONSTRUCTION + MORE_AT_INIT),
    ]
    if str(settings) not in ("{'learning_rate': None}", "{'gradient_noise_scale': 0.1}")
]


def pick(draw: np.random.Generator, among: list[Any]) -> Any:
    return among[draw.integers(len(among))]


def valid_settings(draw: np.random.Generator) -> dict[str, Any]:
    return {argument: pick(draw, values) for argument, values in VALID.items()}


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_one_to_three_faults_among_random_settings_are_an_error_that_names_one_of_them(count: int) -> None:
    draw = np.random.default_rng(count)
    for _ in range(count):
        faults: dict[str, Any] = {}
        for _ in range(draw.integers(1, 4)):
            fault = pick(draw, ALWAYS_BAD)
            faults.update(fault if not faults.keys() & fault.keys() else {})
        with pytest.raises((ValueError, TypeError)) as caught:
            build(**{**valid_settings(draw), **faults}).init(PARAMS, 1.0)
        assert re.match(rf"({'|'.join(faults)})\b", str(caught.value)), (faults, str(caught.value))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_settings_without_a_fault_train(seed: int) -> None:
    settings = valid_settings(np.random.default_rng(seed))
    train = build(**settings)
    state = train.init(PARAMS, 1.0)
    for _ in range(3):
        state, out = train.update(state, 1.0)
    assert float(out.loss) != 6.0  # what it was at first
    assert np.all(np.isfinite(state.params["w"]))
    assert int(state.opt_states[settings["name"] or "OptimizeLoss"].nonfinite_steps) == 0
    assert int(state.global_step) == int(settings["global_step"]) + 3 * settings["increment_global_step"]


# ---- settings that work ----------------------------------------------------------------------------------------------


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def after_steps(steps: int = 3, **settings: Any) -> Any:
    train = build(**settings)
    state = train.init(PARAMS)
    for _ in range(steps):
        state, _ = train.update(state)
    return state


@pytest.mark.parametrize(
    ("argument", "given", "meant"),
    [
        ("learning_rate", 1, 1.0),
        ("learning_rate", np.float16(0.5), 0.5),
        ("learning_rate", np.array(2), 2.0),
        ("clip_gradients", 5, 5.0),
        ("clip_gradients", np.int64(5), 5.0),
        ("clip_gradients", 10**10, 1e10),
        ("clip_gradients", INF, None),
    ],
)
def test_a_number_of_another_type_trains_to_the_bits_of_the_one_that_is_meant(
    argument: str, given: Any, meant: Any
) -> None:
    assert bits(after_steps(**{argument: given}).params) == bits(after_steps(**{argument: meant}).params)


def test_without_a_rate_a_transformation_steps_by_its_own() -> None:
    """From 1 with a gradient of 2: 1 - 0.25 * 2."""
    state = after_steps(1, learning_rate=None, optimizer=optax.sgd(0.25))
    np.testing.assert_array_equal(state.params["w"], 0.5)


def test_a_class_of_the_rate_is_an_optimizer() -> None:
    """As TF1's classes were: w = 1 and a gradient of 2, 1 - 0.1 * 2."""

    class Descent(optax.GradientTransformation):
        def __new__(cls, learning_rate: Any) -> Any:
            return super().__new__(cls, *optax.sgd(learning_rate))

    np.testing.assert_allclose(after_steps(1, optimizer=Descent).params["w"], 0.8, rtol=1e-6)


def test_an_adaptive_decay_of_1_with_a_counter_averages_all_norms_alike() -> None:
    """That is why 1 is no error: n / (n + 1) makes the plain mean of the logarithms, here of 1, 2, 4 and 8."""
    clip = ADAPTIVE(decay=1.0, global_step=True)
    state = clip.init({"w": jnp.zeros(1)})
    for norm in (1.0, 2.0, 4.0, 8.0):
        _, state = clip.update({"w": jnp.full(1, norm)}, state)
    assert float(state.mean) == pytest.approx(1.5 * np.log(2), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("given_to", ["optimize_loss", "init"])
def test_a_seed_a_typed_key_and_its_data_train_alike(given_to: str) -> None:
    trained = []
    for key in (7, np.int64(7), np.uint8(7), jax.random.key(7), jax.random.PRNGKey(7), np.array([0, 7], np.uint32)):
        train = build(gradient_noise_scale=0.1, key=key if given_to == "optimize_loss" else None)
        state, _ = train.update(train.init(PARAMS, key=key if given_to == "init" else None))
        trained.append(bits(state))
    assert all(other == trained[0] for other in trained)


@pytest.mark.parametrize("optimizer", ["SGD", "Momentum", "Adagrad", "RMSProp", "Adam"])
def test_a_multiplier_of_0_leaves_a_parameter_and_its_slots_to_the_bit(optimizer: str) -> None:
    """With noise too. Not RMSProp's slot, an average that starts at 1; and not under Ftrl, as the README says."""
    params = {"w": np.ones(2, np.float32), "still": np.array([-0.0, 1 / 3, 1e30], np.float32)}
    train = build(
        loss=lambda p: jnp.sum(p["w"] ** 2) + 3 * jnp.sum(p["still"]),
        optimizer=optimizer,
        gradient_multipliers={"still": 0.0},
        gradient_noise_scale=0.1,
    )
    state = train.init(params, key=0)
    slots_before = bits(slots_of("still", state))
    for _ in range(5):
        state, _ = train.update(state)
    assert bits(state.params["still"]) == bits(params["still"])
    assert np.all(state.params["w"] != 1)
    if optimizer != "RMSProp":
        assert bits(slots_of("still", state)) == slots_before


def slots_of(name: str, state: Any) -> list[Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(state.opt_states["OptimizeLoss"].optimizer)
    return [leaf for path, leaf in paths if jax.tree_util.keystr(path).endswith(f"['{name}']")]


@pytest.mark.slow
def test_a_parameter_that_is_not_selected_keeps_its_bits_for_ten_thousand_steps_and_has_no_state() -> None:
    params = {"w": np.ones(2, np.float32), "frozen": np.array([-0.0, 1 / 3, 1e30], np.float32)}
    train = build(
        loss=lambda p, x: jnp.sum((p["w"] - x) ** 2) + jnp.sum(p["frozen"]),
        optimizer=lambda rate: optax.adamw(rate, weight_decay=0.1),
        gradient_noise_scale=0.1,
        clip_gradients=ADAPTIVE(),
        variables=["w"],
    )
    state = train.init(params, key=0)
    assert not [leaf for leaf in jax.tree.leaves(state.opt_states) if leaf.shape == (3,)]
    state, _ = jax.lax.scan(train.update, state, jnp.linspace(0.0, 1.0, 10_000))
    assert (bits(state.params["frozen"]), int(state.global_step)) == (bits(params["frozen"]), 10_000)
    assert np.all(state.params["w"] != 1)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_decay_that_gives_no_finite_rate_stops_the_parameters_and_is_counted(bad: float) -> None:
    """From step 2 on, which is not left again, since a skipped step does not count: 0.8 * 0.8 of w = 1 stays."""
    state = after_steps(5, learning_rate_decay_fn=lambda rate, step: jnp.where(step < 2, rate, bad))
    np.testing.assert_allclose(state.params["w"], 0.64, rtol=1e-6)
    assert (int(state.global_step), int(state.opt_states["OptimizeLoss"].nonfinite_steps)) == (2, 3)


# ---- losses and batches ----------------------------------------------------------------------------------------------


def check_skipped(train: optloss.TrainOp, state: optloss.TrainState, *batch: Any) -> Any:
    """Asserts that a step changes nothing but the count of such steps; returns its output."""
    before = jax.device_get(state)
    after, out = train.update(state, *batch)
    assert int(after.opt_states["OptimizeLoss"].nonfinite_steps) == 1
    assert bits(optax.tree.set(after, nonfinite_steps=np.int32(0))) == bits(before)
    return out


def whole(**settings: Any) -> optloss.TrainOp:
    """With noise, averages and a decay, so that there is much that could change."""
    return build(
        optimizer="Adam",
        gradient_noise_scale=0.1,
        clip_gradients=ADAPTIVE(global_step=True),
        learning_rate_decay_fn=lambda rate, step: optloss.exponential_decay(rate, step, 10, 0.5),
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(bad: float) -> None:
    train = whole(loss=lambda params, x: jnp.sum(params["w"] ** 2) + x)
    out = check_skipped(train, train.init(PARAMS, key=0), bad)
    assert not np.isfinite(out.loss)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is_and_its_norm_shows_which() -> None:
    """The derivative of sqrt at 0 is infinite."""
    train = build(
        loss=lambda params: jnp.sum(jnp.sqrt(params["root"])) + jnp.sum(params["w"] ** 2),
        optimizer="Adam",
        summaries=["gradient_norm"],
    )
    params = {"root": np.array([0.0, 1.0], np.float32), "w": np.ones(2, np.float32)}
    out = check_skipped(train, train.init(params))
    assert float(out.loss) == 3.0
    norms = {name: float(out.summaries[f"OptimizeLoss/gradient_norm/{name}"]) for name in params}
    assert np.isfinite(norms["w"])
    assert not np.isfinite(norms["root"])


@pytest.mark.slow
def test_an_empty_batch_is_skipped() -> None:
    """The mean of nothing is NaN."""
    train = whole(loss=lambda params, x: jnp.mean(x * jnp.sum(params["w"])))
    check_skipped(train, train.init(PARAMS, key=0), jnp.zeros(0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_loss_of_16_bits_trains_and_is_reported_in_float32(dtype: Any) -> None:
    """From 1 with a gradient of 2: 1 - 0.1 * 2, to the rounding of a gradient of 16 bits."""
    train = build(loss=lambda params: jnp.sum(params["w"].astype(dtype) ** 2))
    state, out = train.update(train.init(PARAMS))
    assert (out.loss.dtype, out.summaries["OptimizeLoss/loss"].dtype) == (dtype, np.float32)
    assert float(out.summaries["OptimizeLoss/loss"]) == 6.0
    np.testing.assert_allclose(state.params["w"], 0.8, rtol=1e-2)


def test_a_last_small_batch_is_one_more_program_and_nothing_else() -> None:
    """Against a loop in float64: the gradient of the mean of (w - x) ** 2 is 2 * (w - mean(x))."""
    traces = []

    def mean_square(params: Any, x: Any) -> jax.Array:
        traces.append(x.shape)
        return jnp.mean((params["w"] - x) ** 2)

    train = build(loss=mean_square)
    state, w = train.init({"w": 0.0}), 0.0
    for size in (4, 4, 3, 4, 3):
        batch = np.arange(size, dtype=np.float32)
        state, _ = train.update(state, batch)
        w -= 0.1 * 2 * (w - batch.mean(dtype=np.float64))
    assert traces == [(4,), (3,)]
    assert float(state.params["w"]) == pytest.approx(w, rel=1e-6)


def test_a_batch_of_a_wrong_shape_is_jax_s_error_at_init_before_anything_runs() -> None:
    train = build(loss=lambda params, x: jnp.sum(x @ params["w"]))
    with pytest.raises(TypeError, match=r"dot_general requires contracting dimensions .* \(5,\) and \(2,\)"):
        train.init(PARAMS, np.ones((4, 5), np.float32))


@pytest.mark.slow
def test_a_step_leaks_no_tracer_and_a_loss_that_leaks_one_is_told_by_jax() -> None:
    leaked = []

    def leaking(params: Any, x: Any) -> jax.Array:
        leaked.append(params["w"])
        return x * jnp.sum(params["w"])

    with jax.checking_leaks():
        train = whole(loss=lambda params, x: x * jnp.sum(params["w"]))
        train.update(train.init(PARAMS, 1.0, key=0), 1.0)
        train = build(loss=leaking)
        state = train.init(PARAMS)
        with pytest.raises(Exception, match="Leaked trace"):
            train.update(state, 1.0)
    assert leaked


def test_a_callback_in_the_loss_runs_once_a_step_and_never_in_init() -> None:
    seen: list[float] = []

    def watched(params: Any, x: Any) -> jax.Array:
        jax.debug.callback(lambda value: seen.append(float(value)), x)
        return x * jnp.sum(params["w"])

    train = build(loss=watched)
    state = train.init(PARAMS, 1.0)
    for x in (1.0, 2.0, 3.0):
        state, _ = train.update(state, x)
    jax.effects_barrier()
    assert sorted(seen) == [1.0, 2.0, 3.0]


# ---- parameters, gradients and states --------------------------------------------------------------------------------


def test_a_boolean_parameter_stays_and_the_others_train() -> None:
    train = build()
    state, _ = train.update(train.init({"w": np.ones(2, np.float32), "mask": np.array([True, False])}))
    np.testing.assert_array_equal(state.params["mask"], [True, False])
    np.testing.assert_allclose(state.params["w"], 0.8, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 1, 3, 1, 2)])
def test_a_parameter_of_any_rank_trains(shape: tuple[int, ...]) -> None:
    """Adam's first step is the rate: 1 - 0.1."""
    train = build(loss=lambda params: sum(jnp.sum(leaf**2) for leaf in params.values()), optimizer="Adam")
    params = {"w": np.ones(shape, np.float32), "other": np.ones(2, np.float32)}
    state, _ = train.update(train.init(params))
    assert state.params["w"].shape == shape
    for leaf in state.params.values():
        np.testing.assert_allclose(leaf, 0.9, rtol=1e-5)


def equations(jaxpr: Any) -> int:
    """How many equations a program has, with those of the programs in it."""
    inner = [value for equation in jaxpr.eqns for value in jax.tree.leaves(tuple(equation.params.values()))]
    return len(jaxpr.eqns) + sum(equations(getattr(value, "jaxpr", value)) for value in inner if has_equations(value))


def has_equations(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_a_program_grows_with_the_number_of_arrays_and_no_faster() -> None:
    train = whole(loss=lambda params: sum(jnp.sum(leaf**2) for leaf in params.values()))

    def size(arrays: int) -> int:
        params = {f"{i:03}": jax.ShapeDtypeStruct((3,), jnp.float32) for i in range(arrays)}
        state = jax.eval_shape(lambda params: train.init(params, key=0), params)
        return equations(jax.make_jaxpr(train.update)(state).jaxpr)

    small, middle, large = size(10), size(20), size(40)
    assert large - middle == 2 * (middle - small) > 0


@pytest.mark.parametrize("kind", [lambda tree: dict(reversed(tree.items())), flax.core.FrozenDict])
def test_gradients_in_another_order_or_mapping_are_those_of_their_names(kind: Any) -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    gradients = {"a": jnp.full(2, 2.0), "b": jnp.full(3, -1.0)}
    stage = optloss.transformation(0, 0.1, "SGD")
    updates, _ = stage.update(kind(gradients), stage.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], 0.1, rtol=1e-6)


def test_a_state_of_another_optimizer_of_like_slots_is_a_type_error() -> None:
    """AdaBelief's slots have the shapes of Adam's."""
    state = build(optimizer=optax.adam(0.1)).init(PARAMS)
    with pytest.raises(TypeError, match="^optimizer: its state changes from .*ScaleByAdam.* to .*ScaleByBelief"):
        build(optimizer=optax.adabelief(0.1)).update(state)


# ---- the rows themselves ---------------------------------------------------------------------------------------------


def test_every_fault_of_settings_and_losses_has_its_row_in_order() -> None:
    numbers = [re.fullmatch(r"([AB])(\d+)[a-z]?", row.number) for row in SETTINGS]
    found = dict.fromkeys((match[1], int(match[2])) for match in numbers if match)
    assert list(found) == [*(("A", i) for i in range(1, 39)), *(("B", i) for i in range(1, 26))]
    assert None not in numbers
    assert len({row.number for row in SETTINGS}) == len(SETTINGS)


def test_every_row_has_tests_that_exist_or_a_reason_why_not() -> None:
    here = Path(__file__).parent
    for row in SETTINGS:
        assert bool(row.tests) != bool(row.why_not), row
        for test in row.tests:
            match = re.fullmatch(r"([\w.]+)::(\w+)(?:\[(.*)\])?", test)
            assert match, test
            file, name, case = match.groups()
            assert name in functions_of(here / file), test
            if case and file == Path(__file__).name:
                assert [fault.case for fault in FAULTS].count(case) == 1, test  # else pytest numbers them


@functools.cache
def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
