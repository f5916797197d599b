"""What a compiled step does, by counts that do not vary: passes over memory, temporaries, kernels. No time is asserted.

A parameter's array is 4 bytes. A step of Adam reads the gradient for the norm (4), then gradient and slot for each
slot and writes it (12 + 12), then both slots and the parameter and writes that (16): 44 bytes. The compiler's count
has 8 more, for the branch that norms beyond float32's squares take.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optloss

ROWS, COLUMNS = 1000, 1000
BRANCH = 4


@jax.custom_vjp
def given(params: Any, gradients: Any) -> jax.Array:
    """A loss whose gradients are given and cost nothing."""
    del params, gradients
    return jnp.zeros(())


given.defvjp(lambda params, gradients: (jnp.zeros(()), gradients), lambda gradients, _: (gradients, None))


def shapes(arrays: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {f"{i:03}": jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32) for i in range(arrays)}


def settings(arrays: int, **others: Any) -> dict[str, Any]:
    multipliers = dict.fromkeys(list(shapes(arrays))[::3], 0.5)
    return {"gradient_multipliers": multipliers, "clip_gradients": 1.0, "key": 0, **others}


def compile_update(arrays: int = 4, optimizer: str = "Adam", **others: Any) -> Any:
    """The program of `train.update` on gradients that are given."""
    train = optloss.optimize_loss(given, 0, 1e-3, optimizer, **settings(arrays, **others))
    state = jax.eval_shape(lambda: train.init({name: jnp.zeros((ROWS, COLUMNS)) for name in shapes(arrays)}))
    return train.update.lower(state, shapes(arrays)).compile()


def compile_transformation(arrays: int = 4, **others: Any) -> Any:
    """The program of a step whose updates take the place of the donated gradients."""
    optimizer = optloss.transformation(0, 1e-3, "Adam", **settings(arrays, **others))

    def step(gradients: Any, params: Any, state: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return updates, optax.apply_updates(params, updates), state

    state = jax.eval_shape(lambda: optimizer.init({name: jnp.zeros((ROWS, COLUMNS)) for name in shapes(arrays)}))
    return jax.jit(step, donate_argnums=(0, 1, 2)).lower(shapes(arrays), shapes(arrays), state).compile()


def bytes_per_parameter(program: Any, arrays: int = 4) -> float:
    return float(program.cost_analysis()["bytes accessed"]) / (arrays * ROWS * COLUMNS)


def kernels(program: Any) -> list[str]:
    """The fusions of the program, each with what is in it, less the names."""
    text = program.as_text()
    bodies = dict(re.findall(r"^%(\S+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    called = re.findall(r" fusion\([^\n]*calls=%([\w.\-]+)", text)
    return [re.sub(r"%[\w.\-]+|, metadata=\{.*?\}", "", bodies[name]) for name in called]


@pytest.mark.parametrize(
    ("optimizer", "slots"), [("SGD", 0), ("Momentum", 1), ("Adagrad", 1), ("RMSProp", 1), ("Adam", 2)]
)
def test_a_step_reads_and_writes_what_it_must(optimizer: str, slots: int) -> None:
    """4 for the norm, 12 for each slot, 12 for the parameter, and 4 for each slot or gradient in its update."""
    updates = {"SGD": 1, "Momentum": 1, "Adagrad": 2, "RMSProp": 2, "Adam": 2}[optimizer]
    expected = 4 + 12 * slots + 8 + 4 * updates
    assert bytes_per_parameter(compile_update(optimizer=optimizer)) == pytest.approx(expected + BRANCH, abs=0.1)


@pytest.mark.parametrize("nonfinite", ["skip", "apply"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_setting_stores_an_array_of_a_parameters_size(nonfinite: str, clip: float | None) -> None:
    """Not the squared gradients either, of which the norm and Adam make different use."""
    program = compile_update(nonfinite=nonfinite, clip_gradients=clip, gradient_multipliers=None)
    assert program.memory_analysis().temp_size_in_bytes < 100_000


def test_noise_is_one_more_pass() -> None:
    """The gradient is read and the noisy one written: 8 bytes."""
    quiet, noisy = compile_update(), compile_update(gradient_noise_scale=0.01)
    assert bytes_per_parameter(noisy) == pytest.approx(bytes_per_parameter(quiet) + 8, abs=0.1)


@pytest.mark.parametrize("noise", [None, 0.01])
def test_summaries_of_every_norm_add_no_pass(noise: float | None) -> None:
    without, with_norms = (
        compile_update(gradient_noise_scale=noise, summaries=names) for names in ([], ["gradient_norm"])
    )
    assert bytes_per_parameter(with_norms) == pytest.approx(bytes_per_parameter(without), abs=0.01)


def test_skipping_steps_that_are_not_finite_adds_no_pass() -> None:
    skipping, applying = (compile_update(nonfinite=nonfinite) for nonfinite in ("skip", "apply"))
    assert bytes_per_parameter(skipping) == pytest.approx(bytes_per_parameter(applying), abs=0.01)
    assert skipping.memory_analysis().temp_size_in_bytes < 100_000


@pytest.mark.parametrize("noise", [None, 0.01])
def test_a_step_on_donated_gradients_stores_no_array_besides(noise: float | None) -> None:
    program = compile_transformation(gradient_noise_scale=noise, summaries=["gradient_norm"])
    assert program.memory_analysis().temp_size_in_bytes < 100_000


def test_gradients_made_in_a_step_are_all_that_a_scan_stores() -> None:
    """No copy of parameters or slots: 4 bytes a parameter for the noisy gradients, and one array on the way."""
    train = optloss.optimize_loss(given, 0, 1e-3, "Adam", **settings(4, gradient_noise_scale=0.01))
    state = jax.eval_shape(lambda: train.init({name: jnp.zeros((ROWS, COLUMNS)) for name in shapes(4)}))

    def steps(state: Any, gradients: Any) -> Any:
        def step(state: Any, factor: jax.Array) -> Any:
            return train.update(state, jax.tree.map(lambda gradient: gradient * factor, gradients))

        return jax.lax.scan(step, state, jnp.linspace(0.5, 1.0, 10))

    program = jax.jit(steps, donate_argnums=0).lower(state, shapes(4)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * (4 + 1) * ROWS * COLUMNS + 100_000


@pytest.mark.parametrize("noise", [None, 0.01])
def test_arrays_of_one_shape_share_their_kernels(noise: float | None) -> None:
    """Twice the arrays: twice the calls, and no kernel that was not there but for the sum of all squares."""
    few, many = (
        kernels(compile_update(arrays, gradient_noise_scale=noise, summaries=["gradient_norm"])) for arrays in (6, 12)
    )
    assert len(many) <= 2 * len(few)
    assert len(set(many)) <= len(set(few)) + 2


def test_the_fused_step_is_the_chain_of_its_stages_to_two_ulp() -> None:
    """The norm of what is multiplied comes from factors, so the last digit of the clip factor may differ."""
    params = {"a": jnp.linspace(-1.0, 1.0, 300).reshape(20, 15), "b": jnp.ones(40), "c": jnp.linspace(0.0, 3.0, 7)}
    multipliers = {"a": 0.3, "c": 1.7}
    fused = optloss.transformation(
        0, 0.01, "Adam", gradient_noise_scale=0.1, gradient_multipliers=multipliers, clip_gradients=0.5, key=3
    )
    state = fused.init(params)
    chain = optax.chain(
        optloss.add_gradient_noise(0.1, np.asarray(state.opt_state.noise.key)),
        optloss.multiply_gradients(multipliers),
        optloss.clip_by_global_norm(0.5),
        optloss.adam(0.01),
    )
    chain_state = chain.init(params)
    gradients = jax.tree.map(jnp.sin, params)
    updates, _ = jax.jit(fused.update)(gradients, state, params)
    expected, _ = jax.jit(chain.update)(gradients, chain_state, params)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), maxulp=2)
