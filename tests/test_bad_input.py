"""Every setting that the original refused, and those that it let pass: each an error that names the argument."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss


def loss(params: Any, scale: Any = 1.0) -> jax.Array:
    return scale * jnp.sum(params["w"] ** 2)


def build(**settings: Any) -> optloss.TrainOp:
    settings = {"loss": loss, "global_step": 0, "learning_rate": 0.1, "optimizer": "SGD", **settings}
    return optloss.optimize_loss(**settings)


def ten(rate: Any, step: Any) -> float:
    return 10.0


ADAPTIVE = optloss.adaptive_clipping_fn
NAN, INF = float("nan"), float("inf")


# (settings, error, what the message begins with). Rows marked "TF1 let it pass" are silent accidents of the original.
def without_address(value: Any) -> str:
    """A test's name is the same in every process."""
    return re.sub(r" at 0x\w+", "", str(value))[:60]


AT_CONSTRUCTION = [
    ({"loss": None}, ValueError, "loss: got None of type NoneType; a function"),
    ({"loss": 1.0}, ValueError, "loss: got 1.0"),
    ({"loss": np.zeros((1, 1))}, ValueError, "loss: got array"),
    ({"global_step": 0.0}, TypeError, "global_step: got 0.0, which does not have integer type"),
    ({"global_step": True}, TypeError, "global_step: got True, which does not have integer type"),
    ({"global_step": "0"}, TypeError, "global_step: got '0'"),
    ({"global_step": np.zeros(1, int)}, TypeError, r"global_step: got an array of shape \(1,\), which is not scalar"),
    ({"global_step": -1}, ValueError, "global_step: got -1; an integer scalar >= 0"),  # TF1 let it pass
    ({"learning_rate": -0.1}, ValueError, "learning_rate: got -0.1; a finite number >= 0 would do"),
    ({"learning_rate": -INF}, ValueError, "learning_rate: got -inf"),
    ({"learning_rate": NAN}, ValueError, "learning_rate: got nan"),  # TF1 let it pass
    ({"learning_rate": INF}, ValueError, "learning_rate: got inf"),  # TF1 let it pass
    ({"learning_rate": True}, ValueError, "learning_rate: got True of type bool"),
    ({"learning_rate": "0.1"}, ValueError, "learning_rate: got '0.1' of type str"),
    ({"learning_rate": [0.1]}, ValueError, r"learning_rate: got \[0.1\] of type list"),
    ({"learning_rate": {}}, ValueError, "learning_rate: got {} of type dict"),
    ({"learning_rate": np.ones(2)}, ValueError, r"learning_rate: got an array of shape \(2,\)"),
    ({"learning_rate": 1j}, ValueError, "learning_rate: got 1j of type complex"),
    ({"learning_rate": 10**400}, ValueError, "learning_rate: got 1000"),
    ({"learning_rate": None}, ValueError, r"learning_rate: .* should be specified if optimizer is string \(SGD\)"),
    ({"learning_rate": None, "optimizer": optloss.adam}, ValueError, "learning_rate: .* if optimizer is class .adam "),
    ({"optimizer": lambda: optax.sgd(0.1)}, TypeError, r"optimizer: .* takes \(\), not \(learning_rate\)"),
    ({"optimizer": "adam"}, ValueError, "optimizer: .*you provided 'adam'. Did you mean 'Adam'[?] Optax's own is opt"),
    ({"optimizer": "Adamm"}, ValueError, "optimizer: .*Did you mean 'Adam'"),
    ({"optimizer": ""}, ValueError, "optimizer: Optimizer name should be one of .*you provided ''"),
    ({"optimizer": None}, ValueError, "optimizer: Unrecognized optimizer: got None"),
    ({"optimizer": 3}, ValueError, "optimizer: Unrecognized optimizer: got 3"),
    ({"optimizer": []}, ValueError, "optimizer: Unrecognized optimizer"),
    ({"optimizer": lambda rate: None}, ValueError, "optimizer: Unrecognized optimizer: .* returned None"),
    ({"optimizer": lambda rate: "SGD"}, ValueError, "optimizer: Unrecognized optimizer: .* returned 'SGD'"),
    ({"optimizer": lambda rate: optloss.momentum}, ValueError, "optimizer: Unrecognized optimizer: .* returned <fun"),
    ({"optimizer": optloss.momentum}, TypeError, "optimizer: momentum .*'momentum'"),
    ({"optimizer": lambda rate: 1 / 0}, TypeError, "optimizer: .*raised ZeroDivisionError"),
    ({"gradient_noise_scale": -0.01}, ValueError, "gradient_noise_scale: got -0.01"),  # TF1 let it pass
    ({"gradient_noise_scale": NAN}, ValueError, "gradient_noise_scale: got nan"),  # TF1 let it pass
    ({"gradient_noise_scale": "1"}, TypeError, "gradient_noise_scale: got '1'"),
    ({"gradient_noise_scale": lambda step: jnp.ones(2)}, ValueError, "gradient_noise_scale: the function returns"),
    ({"gradient_multipliers": ["w"]}, TypeError, r"gradient_multipliers: got \['w'\] of type list"),
    ({"gradient_multipliers": {"w": None}}, ValueError, r"gradient_multipliers\['w'\]: None values not supported"),
    ({"gradient_multipliers": {"w": "2"}}, TypeError, r"gradient_multipliers\['w'\]: got '2'"),
    ({"gradient_multipliers": {"w": NAN}}, ValueError, r"gradient_multipliers\['w'\]: got nan"),  # TF1 let it pass
    ({"gradient_multipliers": {"w": np.array([1, INF])}}, ValueError, r"gradient_multipliers\['w'\]: got array"),
    ({"gradient_multipliers": {3: 1.0}}, TypeError, "gradient_multipliers: got the key 3"),
    ({"clip_gradients": -1.0}, ValueError, "clip_gradients: got -1.0; a number >= 0, an Optax"),  # TF1 let it pass
    ({"clip_gradients": NAN}, ValueError, "clip_gradients: got nan"),  # TF1 let it pass
    ({"clip_gradients": True}, ValueError, "clip_gradients: got True of type bool"),
    ({"clip_gradients": "1.0"}, ValueError, "clip_gradients: got '1.0' of type str"),
    ({"clip_gradients": [1.0]}, ValueError, r"clip_gradients: got \[1.0\] of type list"),
    ({"clip_gradients": ADAPTIVE}, TypeError, "clip_gradients: got the function adaptive_clipping_fn itself"),
    ({"clip_gradients": lambda: None}, TypeError, r"clip_gradients: .* takes \(\), not \(grads_and_vars\)"),
    ({"global_step": None, "learning_rate_decay_fn": ten}, ValueError, "global_step: global_step is required for lea"),
    ({"learning_rate_decay_fn": lambda rate: rate}, TypeError, "learning_rate_decay_fn: .*not .learning_rate, global"),
    ({"learning_rate_decay_fn": 0.5}, TypeError, "learning_rate_decay_fn: got 0.5"),
    ({"learning_rate_decay_fn": lambda r, s: None}, ValueError, "learning_rate_decay_fn: .*returns None"),
    ({"learning_rate_decay_fn": lambda r, s: jnp.ones(2)}, ValueError, "learning_rate_decay_fn: .*a scalar rate"),
    ({"learning_rate_decay_fn": lambda r, s: r if s > 3 else 0}, TypeError, "learning_rate_decay_fn: .*raised Tracer"),
    ({"update_ops": len}, TypeError, "update_ops: got <built-in function len>"),
    ({"update_ops": [1]}, TypeError, "update_ops: got 1 among them"),
    ({"variables": []}, ValueError, r"variables: No variables to optimize: got \[\]"),
    ({"variables": ()}, ValueError, r"variables: No variables to optimize: got \(\)"),
    ({"variables": [1, 2]}, TypeError, "variables: got 1 among them"),
    ({"variables": {"w": "False"}}, TypeError, "variables: got 'False' among them"),
    ({"name": 3}, TypeError, "name: got 3 of type int"),
    ({"name": ""}, ValueError, "name: got ''"),
    ({"name": "a\n\x1b[2J"}, ValueError, r"name: got 'a\\n\\x1b\[2J'; printable characters would do"),
    ({"summaries": "loss"}, ValueError, "summaries: got 'loss' of type str"),
    ({"summaries": [None]}, ValueError, "summaries: got None"),
    ({"summaries": ["loss", "bad_summary"]}, ValueError, "summaries: got 'bad_summary'"),
    ({"summaries": ["Loss"]}, ValueError, "summaries: got 'Loss'. Did you mean 'loss'[?]"),
    ({"summaries": ["global_norm"]}, ValueError, "summaries: got 'global_norm'. Did you mean 'global_gradient_norm'"),
    ({"colocate_gradients_with_ops": 1}, TypeError, "colocate_gradients_with_ops: got 1 of type int"),
    ({"increment_global_step": None}, TypeError, "increment_global_step: got None"),
    ({"has_aux": "yes"}, TypeError, "has_aux: got 'yes'"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite: got 'ignore'. One of skip, apply would do"),
    ({"key": -1}, ValueError, "key: got -1; an integer from 0"),
    ({"key": 2**64}, ValueError, "key: got 18446744073709551616"),
    ({"key": 0.5}, TypeError, "key: got 0.5"),
]


@pytest.mark.parametrize(("settings", "error", "message"), AT_CONSTRUCTION, ids=without_address)
def test_a_bad_setting_is_an_error_at_construction(settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}") as caught:
        build(**settings)
    assert len(str(caught.value)) < 1000


ADAPTIVE_SETTINGS = [
    ({"std_factor": -1.0}, ValueError, "std_factor: got -1.0"),
    ({"decay": 1.5}, ValueError, "decay: got 1.5; a finite number >= 0 and <= 1"),
    ({"decay": "0.9"}, TypeError, "decay: got '0.9'"),
    ({"static_max_norm": 0.0}, ValueError, "static_max_norm: got 0.0; a number > 0"),
    ({"static_max_norm": -1.0}, ValueError, "static_max_norm: got -1.0"),  # TF1 flipped the gradients' sign
    ({"epsilon": 0.0}, ValueError, "epsilon: got 0.0"),
    ({"global_step": 0}, TypeError, "global_step: got 0 of type int; True or False"),
    ({"report_summary": 1}, TypeError, "report_summary: got 1"),
    ({"skip_zero_norm": 1}, TypeError, "skip_zero_norm: got 1"),
]


@pytest.mark.parametrize(("settings", "error", "message"), ADAPTIVE_SETTINGS)
def test_a_bad_setting_of_the_adaptive_clip_is_an_error(settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        optloss.adaptive_clipping_fn(**settings)


PARAMS = {"w": np.ones((2, 3), np.float32), "n": np.int32(3)}


def changes_its_state() -> optax.GradientTransformation:
    return optax.GradientTransformation(lambda p: jnp.zeros(2), lambda u, s, p=None: (u, jnp.zeros(3)))


# What building cannot know: found by tracing in `init`.
AT_INIT = [
    ({"gradient_noise_scale": 0.1}, ValueError, "key: got None, but gradient_noise_scale needs one"),
    ({"gradient_multipliers": {"v": 1.0}}, ValueError, "gradient_multipliers: no parameter is named 'v'. Para"),
    ({"gradient_multipliers": {"w:0": 1.0}}, ValueError, "gradient_multipliers: .*'w:0'. Did you mean 'w'"),
    ({"gradient_multipliers": {"x/*": 1.0}}, ValueError, "gradient_multipliers: no parameter matches 'x/[*]'"),
    ({"gradient_multipliers": {"w*": 1.0, "*": 2.0}}, ValueError, "gradient_multipliers: 'w[*]' and '[*]' both match"),
    ({"gradient_multipliers": {"w": np.ones(2)}}, ValueError, r"gradient_multipliers\['w'\]: got shape \(2,\), which"),
    ({"variables": ["v"]}, ValueError, "variables: no parameter is named 'v'"),
    ({"variables": ["n"]}, ValueError, "variables: 'n' is int32 and has no gradient"),
    ({"variables": lambda name: False}, ValueError, "variables: got .*No variables to optimize"),
    ({"variables": {"w": False, "n": True}}, ValueError, "variables: got .*No variables to optimize"),
    ({"variables": [True]}, ValueError, "variables: the tree of booleans is not the parameters' tree"),
    ({"clip_gradients": lambda pairs: None}, TypeError, "clip_gradients: .* returned NoneType; a list of"),
    ({"clip_gradients": lambda pairs: pairs[:0]}, ValueError, r"clip_gradients: .* of shapes \[\]; it got \[\(2, 3\)"),
    ({"clip_gradients": optax.clip_by_global_norm}, TypeError, "clip_gradients: clip_by_global_norm .* returned Grad"),
    ({"optimizer": changes_its_state()}, TypeError, "optimizer: its state changes from float32"),
    ({"update_ops": [lambda model_state: model_state]}, ValueError, "update_ops: there is no model state"),
    ({"global_step": 2**31}, ValueError, "global_step: got 2147483648, too large for int32; enable jax_enable_x64"),
]


@pytest.mark.parametrize(("settings", "error", "message"), AT_INIT, ids=without_address)
def test_what_building_could_not_find_is_an_error_at_init(settings: Any, error: Any, message: str) -> None:
    train = build(**settings)
    with pytest.raises(error, match=f"^{message}"):
        train.init(PARAMS)


BAD_LOSSES = [
    (lambda p: None, {}, "returned None; a real scalar array would do"),
    (lambda p: p["w"], {}, r"returned float32\[2,3\]; a real scalar array would do. Take its mean[?]"),
    (lambda p: jnp.sum(p["w"])[None], {}, r"returned float32\[1\]"),
    (lambda p: jnp.int32(3), {}, r"returned int32\[\]"),
    (lambda p: "loss", {}, "returned loss"),
    (lambda p: 1.0, {}, "returned 1.0. No gradients provided for any variable"),
    (lambda p: (jnp.sum(p["w"]), {}), {}, "returned .*Is has_aux=True missing"),
    (lambda p: jnp.sum(p["w"]), {"has_aux": True}, r"returned float32\[\]; \(scalar, aux\) would do"),
]


@pytest.mark.parametrize(("bad_loss", "settings", "message"), BAD_LOSSES)
def test_a_loss_that_is_no_scalar_is_a_value_error(bad_loss: Any, settings: Any, message: str) -> None:
    train = build(loss=lambda params, x: bad_loss(params), **settings)
    with pytest.raises(ValueError, match=f"^loss: .*{message}"):
        train.init(PARAMS, 0.0)
    with pytest.raises(ValueError, match=f"^loss: .*{message}"):
        train.update(train.init(PARAMS), 0.0)


def test_a_loss_that_depends_on_no_trained_parameter_is_a_value_error_at_init() -> None:
    train = build(loss=lambda params, x: jnp.sum(x * params["v"]), variables=["w"])
    with pytest.raises(ValueError, match=r"^loss: No gradients provided .* does not depend on \['w'\]"):
        train.init({"w": np.ones(2), "v": np.ones(2)}, np.ones(2))


def test_a_model_state_that_the_loss_does_not_return_is_a_value_error() -> None:
    train = build(loss=lambda params, model_state: jnp.sum(params["w"]) * model_state)
    with pytest.raises(ValueError, match=r"^loss: .*returned float32\[\]; \(scalar, model_state\) would do"):
        train.update(train.init(PARAMS, model_state=1.0))


def test_a_model_state_of_another_shape_is_a_type_error() -> None:
    train = build(loss=lambda params, model_state: (jnp.sum(params["w"]), jnp.ones(2)))
    with pytest.raises(TypeError, match=r"^loss: its state changes from float32\[\] to float32\[2\]"):
        train.update(train.init(PARAMS, model_state=1.0))


def test_a_parameter_that_is_no_array_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="^params: got 'x' of type str among the leaves"):
        build().init({"w": "x"})


def test_a_complex_parameter_is_a_type_error_unless_it_is_not_trained() -> None:
    params = {"w": np.ones(2, np.float32), "z": np.ones(2, np.complex64)}
    with pytest.raises(TypeError, match="^params: 'z' is complex64"):
        build().init(params)
    state, _ = (train := build(variables=["w"])).update(train.init(params))
    np.testing.assert_array_equal(state.params["z"], params["z"])


def test_parameters_of_one_name_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="^params: two parameters are named 'a/b'"):
        build().init({"a/b": np.ones(1), "a": {"b": np.ones(1)}})


def test_an_op_of_the_same_name_is_a_value_error() -> None:
    state = build().init(PARAMS)
    with pytest.raises(ValueError, match="^name: the state has an op named 'OptimizeLoss' already"):
        build().init(state)


def test_a_second_op_brings_a_counter_and_a_model_state_where_the_first_had_none() -> None:
    def with_state(params: Any, model_state: Any, *args: Any) -> Any:
        return jnp.sum(params["w"]), model_state + 1

    one = build().init(PARAMS, model_state=2.0)
    with pytest.raises(ValueError, match="^model_state: the state that is joined has one already; None would do"):
        build(name="other").init(one, model_state=1.0)
    uncounted = build(global_step=None).init(PARAMS)
    assert (uncounted.global_step, uncounted.model_state) == (None, None)
    other = build(loss=with_state, name="other", global_step=7)
    state, _ = other.update(other.init(uncounted, model_state=1.0))
    assert (int(state.global_step), float(state.model_state)) == (8, 2.0)


def test_a_loss_with_aux_and_a_model_state_has_to_return_both() -> None:
    train = build(loss=lambda params, model_state: (jnp.sum(params["w"]), model_state), has_aux=True)
    with pytest.raises(ValueError, match=r"^loss: .* returned .*; \(scalar, \(model_state, aux\)\) would do"):
        train.update(train.init(PARAMS, model_state=1.0))


@pytest.mark.parametrize(("limit", "type_"), [(jnp.ones(2), r"float32\[2\]"), (jnp.array(True), r"bool\[\]")])
def test_a_traced_setting_that_is_no_number_is_named(limit: jax.Array, type_: str) -> None:
    with pytest.raises(ValueError, match=f"^clip_norm: got a traced {type_}; .* would do"):
        jax.jit(lambda limit: optloss.clip_by_global_norm(limit).init(PARAMS))(limit)


def test_a_traced_step_is_where_the_counter_starts() -> None:
    @jax.jit
    def after_a_step(first: jax.Array) -> jax.Array:
        train = build(global_step=first)
        return train.update(train.init(PARAMS))[0].global_step

    assert [int(after_a_step(first)) for first in (0, 41)] == [1, 42]


def test_a_state_of_another_op_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^state: it has no op named 'other', only \['OptimizeLoss'\]"):
        build(name="other").update(build().init(PARAMS))
    with pytest.raises(TypeError, match="^state: got dict"):
        build().update({})


def test_the_transformation_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="^update_ops: got "):
        optloss.transformation(0, 0.1, "SGD", update_ops=[len])
    optimizer = optloss.transformation(0, 0.1, "SGD")
    params = {"w": jnp.ones(1)}
    with pytest.raises(ValueError, match="^params: got None; the pipeline needs them"):
        optimizer.update(params, optimizer.init(params))


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1},
        {"learning_rate": np.float32(0.1)},
        {"learning_rate": np.array(0.1)},
        {"learning_rate": jnp.float32(0.1)},
        {"learning_rate": 0.0},
        {"clip_gradients": 1},
        {"clip_gradients": np.float32(1.0)},
        {"clip_gradients": jnp.float32(1.0)},
        {"clip_gradients": INF},
        {"gradient_noise_scale": 0},
        {"gradient_multipliers": {"w": 2}},
        {"gradient_multipliers": {"w": -1.0}},
        {"gradient_multipliers": {"w": jnp.ones((2, 3))}},
        {"gradient_multipliers": {}},
        {"global_step": np.int64(5)},
        {"global_step": jnp.uint8(5)},
        {"summaries": ()},
        {"summaries": ["loss", "loss"]},
        {"variables": "w"},
        {"variables": ["w", "w"]},
        {"variables": {"w": True, "n": False}},
        {"learning_rate_decay_fn": ten},
    ],
    ids=without_address,
)
def test_a_number_of_another_type_works_where_a_float_is_meant(settings: Any) -> None:
    train = build(**settings)
    state, out = train.update(train.init(PARAMS, 1.0), 1.0)
    assert float(out.loss) == 6.0
    assert np.all(np.isfinite(state.params["w"]))


def test_building_makes_no_array_and_starts_no_backend() -> None:
    """In a process of its own: a backend that has started stays."""
    import subprocess
    import sys

    program = """
import jax, optloss
from jax._src import xla_bridge
optloss.optimize_loss(
    lambda p: p, 0, 0.1, lambda rate: optloss.adam(rate), 0.1, {"*": lambda step: 0.5}, optloss.adaptive_clipping_fn(),
    lambda rate, step: optloss.cosine_decay(rate, step, 10), key=0)
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
