"""Configurations by the thousand: each trains within the contract, or is refused with the name of a bad argument.

    python tests/test_fuzz.py --examples 10000 [--seed 1]

runs as many and prints how many trained, how many were refused and by which argument, and what broke the contract.
"""

import argparse
import collections
import contextlib
import functools
import re
import sys
import time
import warnings
from typing import Any

import jax
import numpy as np
from hypothesis import Phase, given, seed, settings
from strategies import PROFILE, WILD, Configuration, configurations

import optloss

_X = np.float32(0.5)  # the loss's argument
_FOUND_BY_A_CALL = {"loss", "update_ops", "axis_name"}  # before the loss has its argument, nothing can be said


def check_configuration(configuration: Configuration, *, compiles: bool = True) -> str:
    """Returns the argument that refused the configuration, or "trained"; raises an AssertionError where it is neither.

    Without `compiles` the steps run one operation at a time, and their types are those of a trace besides.
    """
    stage = "optimize_loss"
    with warnings.catch_warnings(), contextlib.nullcontext() if compiles else jax.disable_jit():
        warnings.simplefilter("error")
        try:
            calls, chosen = _counted(configuration)
            train = optloss.optimize_loss(**chosen)
            stage = "init"
            args = (_X,) if configuration.checks_loss else ()
            state = train.init(configuration.params, *args, **configuration.init)
            stage = "update"
            _check_training(configuration, train, state, calls, compiles=compiles)
        except AssertionError:
            raise
        except Exception as error:
            return _refusal(configuration, stage, error)
    assert not configuration.bad, f"no error, though {sorted(configuration.bad)} are bad"
    return "trained"


def _counted(configuration: Configuration) -> tuple[list[int], dict[str, Any]]:
    """The settings with a loss that counts its calls: each is a trace."""
    calls: list[int] = []
    chosen = dict(configuration.settings)
    if "loss" not in configuration.bad:
        loss = chosen["loss"]

        @functools.wraps(loss)
        def counted(*args: Any) -> Any:
            calls.append(1)
            return loss(*args)

        chosen["loss"] = counted
    return calls, chosen


def _refusal(configuration: Configuration, stage: str, error: Exception) -> str:
    """The argument that an error names, if it is as an error should be."""
    text = str(error)
    short = f"{type(error).__name__} in {stage}: {text[:300]}"
    assert isinstance(error, ValueError | TypeError), short
    assert configuration.bad, f"a good configuration was refused: {short}"
    named = re.match(r"\w*", text)[0]  # type: ignore[index]
    assert named in configuration.bad, f"names none of {sorted(configuration.bad)}: {short}"
    assert len(text) < 1000, f"{len(text)} characters: {short}"
    assert text.count("\n") < 12, f"{text.count(chr(10)) + 1} lines: {short}"
    assert "jax/_src" not in text, short
    if stage == "update":
        late = {"axis_name"} if configuration.checks_loss else _FOUND_BY_A_CALL
        assert named in late, f"late: {short}"
    return named


def _check_training(
    configuration: Configuration, train: optloss.TrainOp, state: optloss.TrainState, calls: list[int], *, compiles: bool
) -> None:
    """Two steps within the contract."""
    types = _types(state)
    if not compiles:
        with jax.disable_jit(False):
            new, _ = jax.eval_shape(train.update, state, _X)
        assert _types(new) == types, f"traced, the state changes from {types} to {_types(new)}"
    for _ in range(2):
        old = jax.tree.map(np.array, state)  # copies: the state is donated
        traced = len(calls)
        state, out = train.update(state, _X)
        assert not configuration.bad, f"no error, though {sorted(configuration.bad)} are bad"
        assert _types(state) == types, f"the state changes from {types} to {_types(state)}"
        _check_step(configuration, old, jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, out))
    assert not compiles or len(calls) == traced, "the second step was traced anew"


def _types(tree: Any) -> Any:
    """The tree with shape, dtype and weak type of each array."""
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype), leaf.weak_type), tree)


def _check_step(
    configuration: Configuration, old: optloss.TrainState, new: optloss.TrainState, out: optloss.TrainOutput
) -> None:
    """One step: what moved, and what may not have."""
    chosen, name = configuration.settings, configuration.settings["name"] or "OptimizeLoss"
    was, now = old.opt_states[name], new.opt_states[name]
    skipped = int(now.nonfinite_steps) - int(was.nonfinite_steps)
    assert skipped in (0, 1)
    assert not (configuration.tame and skipped), "a step was skipped where nothing can overflow"
    names = optloss.parameter_names(configuration.params)
    pairs = zip(names, jax.tree.leaves(old.params), jax.tree.leaves(new.params), strict=True)
    moved = {name for name, a, b in pairs if a.tobytes() != b.tobytes()}
    assert moved <= configuration.trained, f"{moved - configuration.trained} moved, which are not trained"
    if skipped and chosen["nonfinite"] == "skip":
        still = new._replace(opt_states={name: now._replace(nonfinite_steps=was.nonfinite_steps)})
        _assert_same_bits(still, old)
    elif chosen["global_step"] is not None:
        goal = min(int(old.global_step) + chosen["increment_global_step"], 2**31 - 1)
        assert int(new.global_step) == goal, f"the step went from {old.global_step} to {new.global_step}"
    if chosen["nonfinite"] == "skip":
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert np.all(_is_finite(b) | ~_is_finite(a)), f"{a} became {b}"
    assert all(tag.startswith(f"{name}/") for tag in out.summaries)
    if configuration.tame:
        real = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(old.params) if leaf.dtype.kind in "fV"]
        np.testing.assert_allclose(out.loss, _X * sum(np.sum((leaf - 1) ** 2) for leaf in real), rtol=1e-5)
        scalars = [figure for figure in out.summaries.values() if not isinstance(figure, optloss.Histogram)]
        assert np.all(np.isfinite(scalars)), f"{out}"


def _is_finite(leaf: np.ndarray) -> Any:
    return np.isfinite(leaf.astype(np.float64))


def _assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.tobytes() == y.tobytes(), f"a skipped step changed {y} to {x}"


@settings(PROFILE, max_examples=12, phases=[Phase.generate])  # to shrink a failure would take hundreds of compilations
@given(configurations(most_bad=0))
def test_a_good_configuration_trains_within_the_contract(configuration: Configuration) -> None:
    assert check_configuration(configuration) == "trained"


@settings(PROFILE, max_examples=100)
@given(configurations(least_bad=1))
def test_a_bad_configuration_is_refused_by_the_name_of_a_bad_argument(configuration: Configuration) -> None:
    assert check_configuration(configuration, compiles=False) in configuration.bad


def run(examples: int, first: int, compile_every: int, minutes: float) -> int:
    """Checks as many configurations, prints a summary, and returns how many broke the contract."""
    counts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    start = time.monotonic()

    @seed(first)
    @settings(PROFILE, derandomize=False, max_examples=examples, phases=[Phase.generate])
    @given(configurations())
    def check(configuration: Configuration) -> None:
        if time.monotonic() - start > 60 * minutes:
            return
        is_good = not configuration.bad
        # Without jit, an optimizer sees the number that a wild decay makes, and refuses it.
        is_wild = configuration.settings["learning_rate_decay_fn"] in WILD["learning_rate_decay_fn"]
        compiles = is_good and (is_wild or counts["good"] % compile_every == 0)
        counts.update({"ran": 1, "good": is_good, "compiled": compiles})
        try:
            counts[check_configuration(configuration, compiles=compiles)] += 1
        except AssertionError as error:
            kind = re.sub(r"0x\w+|\d+", "", str(error).split("\n", 1)[0])[:100]
            kinds[kind] += 1
            if kinds[kind] == 1:
                print(f"failure {len(kinds)}: {error}\n{configuration!r}", flush=True)
        if counts["ran"] % 1000 == 0:
            print(f"{counts['ran']} ran in {time.monotonic() - start:.0f} s", flush=True)
            jax.clear_caches()

    check()
    words = ("ran", "good", "compiled", "trained")
    print(", ".join(f"{word} {counts.pop(word, 0)}" for word in words) + f", broke the contract {sum(kinds.values())}")
    print(f"{sum(counts.values())} were refused, by " + ", ".join(f"{name} {n}" for name, n in counts.most_common()))
    print("\n".join(f"{n} times {kind}" for kind, n in kinds.most_common()))
    return sum(kinds.values())


def main() -> int:
    """Prints the summary; 1 where a configuration broke the contract."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--compile-every", type=int, default=20, help="of the good ones; others run without jit")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, jax {jax.__version__}", flush=True)
    return int(run(arguments.examples, arguments.seed, arguments.compile_every, arguments.minutes) > 0)


if __name__ == "__main__":
    sys.exit(main())
