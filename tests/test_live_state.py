"""What a caller holds is never lost without a word: states given away twice, steps that fail, Ctrl-C, shared arrays."""

import os
import random
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optloss


def loss(params: Any, x: Any) -> jax.Array:
    return jnp.sum((params["w"] - x) ** 2)


def build(**settings: Any) -> optloss.TrainOp:
    settings = {"loss": loss, "global_step": 0, "learning_rate": 0.1, "optimizer": "Adam", **settings}
    return optloss.optimize_loss(**settings)


# ---- states that were given away -------------------------------------------------------------------------------------


@pytest.mark.parametrize("colocates", [False, True])
def test_a_state_used_twice_is_an_error_that_explains_it(colocates: bool) -> None:
    train = build(colocate_gradients_with_ops=colocates)
    state = train.init({"w": jnp.zeros(3)})
    train.update(state, 1.0)
    with pytest.raises(ValueError, match=r"^state: it was given to an update before.*train.update.*copy it") as caught:
        train.update(state, 1.0)
    assert len(str(caught.value)) < 400


def test_a_batch_that_was_deleted_is_not_blamed_on_the_state() -> None:
    train, batch = build(), jnp.ones(3)
    state = train.init({"w": jnp.zeros(3)})
    batch.delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted") as caught:
        train.update(state, batch)
    assert "state:" not in str(caught.value)
    train.update(state, 1.0)


def test_an_error_while_tracing_leaves_the_state_alive() -> None:
    train = build()
    state = train.init({"w": jnp.zeros(3)})
    with pytest.raises(TypeError, match="incompatible shapes") as caught:
        train.update(state, np.ones(2))
    assert not any("lost" in note for note in caught.value.__notes__)
    state, _ = train.update(state, 1.0)
    assert int(state.global_step) == 1


def test_a_step_that_fails_while_it_runs_says_that_the_state_is_lost_and_how_to_keep_one() -> None:
    def breaks(x: Any) -> None:
        raise OSError("no such sensor")

    def bad_loss(params: Any, x: Any) -> jax.Array:
        jax.debug.callback(breaks, x)
        return loss(params, x)

    train = build(loss=bad_loss)
    state = train.init({"w": jnp.zeros(3)})
    kept = jax.tree.map(jnp.copy, state)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such sensor") as caught:
        jax.block_until_ready(train.update(state, 1.0))
    if state.params["w"].is_deleted():  # where a step runs beside the caller, the error comes after the call
        assert any("copy it before" in note for note in caught.value.__notes__)
    build().update(kept, 1.0)


def test_a_step_compiled_ahead_takes_the_arguments_of_update_and_names_one_of_another_type() -> None:
    train = build(optimizer="SGD", loss=lambda params, x: jnp.sum(params["w"] * x))
    state = train.init({"w": jnp.ones(3)})
    compiled = train.update.lower(state, jnp.ones(3)).compile()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"float32\[3\] and called with float32\[4\]"):
        compiled(state, jnp.ones(4))
    state, _ = compiled(state, jnp.ones(3))
    np.testing.assert_allclose(state.params["w"], 0.9)


def test_what_jit_makes_of_update_has_jit_s_own_lower() -> None:
    train = build()
    state = train.init({"w": jnp.zeros(3)})
    doubled = jax.jit(lambda state: train.update(state, 1.0)[0].params["w"] * 2)
    assert doubled.lower(state).compile()(state).shape == (3,)
    jitted = jax.jit(jax.vmap(train.update, in_axes=(None, 0)))
    assert jitted.lower(state, jnp.ones(2)).compile()(state, jnp.ones(2))[1].loss.shape == (2,)


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupted(trains: list[optloss.TrainOp], state: optloss.TrainState, after: float) -> optloss.TrainState:
    """The state that a loop of steps holds when Ctrl-C ends it."""

    def loop() -> None:
        nonlocal state
        timer.start()
        while True:
            for train in trains:
                state, _ = train.update(state, 1.0)

    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        loop()
    timer.join()
    return state


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("names", [["one"], ["one", "other"]])
def test_ctrl_c_in_a_loop_of_steps_leaves_a_live_state(names: list[str], size: int) -> None:
    """At moments of all kinds; steps of a tenth of a millisecond, and steps that are waited for."""
    trains, draw = [build(name=name) for name in names], random.Random(0)
    state: Any = {"w": jnp.zeros(size)}
    for train in trains:
        state = train.init(state)
    for train in trains:
        state, _ = train.update(state, 1.0)
    for _ in range(20):
        before = int(state.global_step)
        state = interrupted(trains, state, draw.uniform(0, 0.01))
        assert int(state.global_step) >= before
        assert np.all(np.isfinite(state.params["w"]))


class _Interrupted:
    """An output whose making is interrupted, as by a Ctrl-C in the midst of it."""

    count, times = 0, 1


jax.tree_util.register_pytree_node(
    _Interrupted, lambda node: ((node.value,), None), lambda _, children: _make_interrupted(children)
)


def _make_interrupted(children: Any) -> _Interrupted:
    if isinstance(children[0], jax.Array) and not isinstance(children[0], jax.core.Tracer):
        _Interrupted.count += 1
        if _Interrupted.count <= _Interrupted.times:
            raise KeyboardInterrupt
    node = _Interrupted()
    node.value = children[0]  # type: ignore[attr-defined]
    return node


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_after_a_step_comes_at_the_next_one_and_the_state_between_them_is_live(times: int) -> None:
    _Interrupted.count, _Interrupted.times = 0, times

    def with_aux(params: Any, x: Any) -> Any:
        return loss(params, x), _make_interrupted([params["w"]])

    train = build(loss=with_aux, has_aux=True)
    state = train.init({"w": jnp.zeros(3)})
    state, output = train.update(state, 1.0)
    assert _Interrupted.count == times + 1
    assert output.aux.value.shape == (3,)
    with pytest.raises(KeyboardInterrupt):
        train.update(state, 1.0)
    state, _ = train.update(state, 1.0)
    assert int(state.global_step) == 2


@pytest.mark.parametrize("wakes", [True, False], ids=["posix", "windows"])
def test_an_interrupt_after_the_last_step_comes_all_the_same(wakes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not wakes:
        monkeypatch.delattr(signal, "pthread_kill")
    _Interrupted.count, _Interrupted.times = 0, 1
    train = build(loss=lambda params, x: (loss(params, x), _make_interrupted([params["w"]])), has_aux=True)
    state, _ = train.update(train.init({"w": jnp.zeros(3)}), 1.0)

    def wait() -> None:
        for _ in range(1 if wakes else 600):
            threading.Event().wait(60 if wakes else 0.1)

    with pytest.raises(KeyboardInterrupt):
        wait()
    assert int(state.global_step) == 1


def test_an_interrupt_before_a_step_began_says_nothing_of_a_state_that_is_alive() -> None:
    calls = []

    def interrupted_once(params: Any, x: Any) -> jax.Array:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return loss(params, x)

    train = build(loss=interrupted_once)
    state = train.init({"w": jnp.zeros(3)})
    with pytest.raises(KeyboardInterrupt) as caught:
        train.update(state, 1.0)
    assert not any("lost" in note for note in getattr(caught.value, "__notes__", []))
    state, _ = train.update(state, 1.0)
    assert int(state.global_step) == 1


# ---- what the caller gave --------------------------------------------------------------------------------------------


def test_tied_arrays_become_two_parameters_and_both_learn() -> None:
    """In JAX an array in two places is two parameters: nothing ties them but the loss."""
    tied = jnp.zeros(3)
    train = build(loss=lambda params, x: jnp.sum((params["a"] - x) ** 2 + (params["b"] + x) ** 2), optimizer="SGD")
    state = train.init({"a": tied, "b": tied})
    for _ in range(30):
        state, _ = train.update(state, 1.0)
    np.testing.assert_allclose(state.params["a"], 1.0, atol=0.01)
    np.testing.assert_allclose(state.params["b"], -1.0, atol=0.01)
    np.testing.assert_array_equal(tied, np.zeros(3))


def test_an_average_that_starts_as_the_parameters_stays_alive() -> None:
    train = build()
    average = {"w": jnp.full(3, 5.0)}
    state = train.init(average)
    for _ in range(3):
        state, _ = train.update(state, 1.0)
        average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, average, state.params)
    assert float(average["w"][0]) < 5


@pytest.mark.parametrize("given", [np.ones(3), [1.0, 1.0, 1.0], 1.0, np.float64(1.0), jnp.ones(3, jnp.bfloat16)])
def test_whatever_parameters_are_given_as_is_neither_changed_nor_traced_twice(given: Any) -> None:
    traces = 0

    def counted(params: Any, x: Any) -> jax.Array:
        nonlocal traces
        traces += 1
        return jnp.sum(jnp.stack([jnp.sum((leaf - x) ** 2) for leaf in jax.tree.leaves(params)]))

    train, before = build(loss=counted), jax.tree.map(np.array, given)
    state = train.init(given)
    for _ in range(4):
        state, _ = train.update(state, 3.0)
    assert traces == 1
    jax.tree.map(np.testing.assert_array_equal, given, before)
