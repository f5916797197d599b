"""Parity with the recorded original: trajectories, edge cases, summary tags."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, enable_x64, read_golden

import optloss

TRAJECTORIES = sorted(path.stem for path in (GOLDEN / "trajectories").glob("*.json"))
EDGES = {case["id"]: case for case in read_golden("edge_numeric.json")["cases"]}

# Outcomes of the original that are mended. What comes instead is in the tests below.
MENDED_BY_AN_ERROR = {"clip_negative", "clip_nan", "lr_inf", "lr_nan"}
MENDED_BY_THE_NORM = {"overflow_norm_clip", "clip_zero_zero_gradient", "clip_inf"}
NONFINITE = {case for case in EDGES if case.startswith(("nan_", "inf_"))}


def nested(flat: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """{"dense/kernel": x} as {"dense": {"kernel": x}}."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        functools.reduce(lambda node, folder: node.setdefault(folder, {}), folders, tree)[leaf] = np.asarray(
            value, dtype
        )
    return tree


def flat(tree: Any) -> dict[str, np.ndarray]:
    return dict(zip(optloss.parameter_names(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def rounded(value: Any) -> Any:
    """A hyper-parameter as the original kept it, rounded to float32 even in float64 cases."""
    return float(np.float32(value)) if isinstance(value, float) else value


def optimizer_of(case: dict[str, Any], convert: Any) -> Any:
    """The optimizer in the form in which the original was given it."""
    form, name, args = case["optimizer"]["form"], case["optimizer"]["name"], dict(case["optimizer"]["args"])
    exact = {"initial_accumulator_value"}  # which the original did not round
    if case["dtype"] == "float64" and convert is rounded:
        defaults = {
            "Adam": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
            "RMSProp": {"decay": 0.9, "momentum": 0.0, "epsilon": 1e-10},
            "Ftrl": {"learning_rate_power": -0.5},
            "SGD": {},
        }[name]
        args, form = {**defaults, **args}, "function"
    args = {key: value if key in exact else convert(value) for key, value in args.items()}
    builder = getattr(optloss, name.lower())
    return {
        "name": name,
        "class": builder,
        "function": lambda rate: builder(rate, **args),
        "zero_argument_function": lambda: builder(**args),
        "instance": builder(**args) if form == "instance" else None,
    }[form]


def clip_of(clip: dict[str, Any] | None) -> Any:
    if clip is None:
        return None
    if clip["kind"] == "global_norm":
        return clip["value"]
    settings = {key: value for key, value in clip.items() if key not in ("kind", "use_global_step")}
    return optloss.adaptive_clipping_fn(**settings, global_step=clip["use_global_step"])


def decay_of(decay: dict[str, Any] | None) -> Any:
    if decay is None:
        return None
    function = getattr(optloss, decay["fn"])
    if decay["fn"] == "piecewise_constant":
        return lambda rate, step: function(step, **decay["args"])
    return lambda rate, step: function(rate, step, **decay["args"])


def rate_of(case: dict[str, Any], convert: Any) -> Any:
    rate = case["learning_rate"]
    if isinstance(rate, dict):
        return jnp.asarray(rate["value"], rate["dtype"])
    return convert(rate)


def model_loss(params: Any, x: jax.Array, t: jax.Array, w: jax.Array) -> jax.Array:
    """The model of the golden files."""
    h = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    y = params["scale"] * (h @ params["out"]["kernel"])
    return w * jnp.mean((y - t) ** 2)


def train_op_of(case: dict[str, Any], convert: Any) -> optloss.TrainOp:
    return optloss.optimize_loss(
        model_loss,
        case["initial_global_step"],
        rate_of(case, convert),
        optimizer_of(case, convert),
        gradient_multipliers=case["multipliers"],
        clip_gradients=clip_of(case["clip"]),
        learning_rate_decay_fn=decay_of(case["decay"]),
        variables=case["variables"],
        summaries=case["summaries"],
        increment_global_step=case["increment_global_step"],
    )


def check_trajectory(case: dict[str, Any], convert: Any, tolerance: float) -> None:
    data, dtype = read_golden(f"data/{case['data']}.json"), case["dtype"]
    train = train_op_of(case, convert)
    state = train.init(nested(case["initial_params"], dtype))
    for i, row in enumerate(case["trajectory"]):
        batch = [np.asarray(data[key][i], dtype) for key in ("x", "t", "w")]
        state, out = train.update(state, *batch)
        check_row(row, state, out, case, tolerance)
    check_slots(state.opt_states["OptimizeLoss"].optimizer, case, tolerance)


def check_row(row: dict[str, Any], state: Any, out: Any, case: dict[str, Any], tolerance: float) -> None:
    for name, value in flat(state.params).items():
        np.testing.assert_allclose(
            value, row["params"][name], rtol=0, atol=tolerance, err_msg=f"{name} at {row['step']}"
        )
    np.testing.assert_allclose(out.loss, row["loss"], rtol=tolerance, atol=1e-3 * tolerance)
    assert (None if state.global_step is None else int(state.global_step)) == row.get("global_step")
    scalars = {
        tag.removeprefix("OptimizeLoss/"): value
        for tag, value in out.summaries.items()
        if not isinstance(value, optloss.Histogram)
    }
    assert set(scalars) == {tag.removesuffix("_0") for tag in row["summaries"]}
    for tag, value in row["summaries"].items():
        got = scalars[tag.removesuffix("_0")]
        if tag == "learning_rate":
            np.testing.assert_allclose(got, value, rtol=0, atol=5e-7 * case["learning_rate"])
        else:
            np.testing.assert_allclose(got, value, rtol=2e-4, atol=2e-7, err_msg=f"{tag} at {row['step']}")
    for tag, histogram in row.get("histograms", {}).items():
        got = out.summaries["OptimizeLoss/" + tag.removesuffix("_0")]
        for field, value in histogram.items():
            np.testing.assert_allclose(getattr(got, field), value, rtol=2e-4, atol=2e-7, err_msg=f"{tag} {field}")
        assert int(got.bucket.sum()) == histogram["num"]
    if "adaptive_state" in row:
        check_adaptive(state.opt_states["OptimizeLoss"].clip, row["adaptive_state"])


def check_adaptive(clip: optloss.AdaptiveClippingState, row: dict[str, float]) -> None:
    """The state keeps the variance, the original kept the mean of squares."""
    np.testing.assert_allclose(clip.mean, row["mean"], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(clip.variance + clip.mean**2, row["sq_mean"], rtol=2e-5, atol=2e-5)


def check_slots(optimizer: Any, case: dict[str, Any], tolerance: float) -> None:
    """The optimizer's slots at the end. A momentum of 0 has no slot here: it is the last update."""
    name, centered = case["optimizer"]["name"], case["optimizer"]["args"].get("centered", False)
    slots = {
        "SGD": {},
        "Momentum": {"Momentum": "accumulator"},
        "Adagrad": {"Adagrad": "accumulator"},
        "Adam": {"Adam": "m", "Adam_1": "v"},
        "Ftrl": {"Ftrl": "accumulator", "Ftrl_1": "linear"},
        "RMSProp": {"RMSProp": "mean_square", "RMSProp_2" if centered else "RMSProp_1": "momentum"}
        | ({"RMSProp_1": "mean_gradient"} if centered else {}),
    }[name]
    final = {key.removeprefix("OptimizeLoss/"): value for key, value in case["final_state"].items()}
    checked = 0
    for suffix, field in slots.items():
        tree = getattr(optimizer, field)
        for parameter in case["variables"] or case["initial_params"]:
            expected = np.asarray(final[f"{parameter}/{suffix}"])
            if tree is not None:
                got = flat(tree)[parameter]
            else:
                before, after = (np.asarray(row["params"][parameter]) for row in case["trajectory"][-2:])
                got = before - after
            np.testing.assert_allclose(got, expected, rtol=10 * tolerance, atol=10 * tolerance, err_msg=suffix)
            checked += 1
    if name == "Adam":
        for field in ("beta1_power", "beta2_power"):
            np.testing.assert_allclose(getattr(optimizer, field), final[field], rtol=1e-6)
    assert checked == len(slots) * len(case["variables"] or case["initial_params"])


@pytest.mark.parametrize("trajectory", [t for t in TRAJECTORIES if "_f64" not in t])
def test_optimize_loss_follows_the_recorded_trajectory(trajectory: str) -> None:
    check_trajectory(read_golden(f"trajectories/{trajectory}.json"), lambda value: value, tolerance=2e-5)


@pytest.mark.parametrize("trajectory", [t for t in TRAJECTORIES if "_f64" in t])
@pytest.mark.parametrize(("convert", "tolerance"), [(lambda value: value, 1e-6), (rounded, 1e-11)])
def test_optimize_loss_follows_the_recorded_float64_trajectory(trajectory: str, convert: Any, tolerance: float) -> None:
    with enable_x64(True):
        check_trajectory(read_golden(f"trajectories/{trajectory}.json"), convert, tolerance)


def test_all_recorded_trajectories_are_run() -> None:
    assert len(TRAJECTORIES) == 65
    assert len(EDGES) == 34


def edge_loss(on: str) -> Any:
    def loss(params: Any, k: jax.Array) -> jax.Array:
        q = jnp.sum(params["w"] ** 2) / 2
        square = params["b"] * params["b"]
        return k * (q + square) if on == "all" else q + k * square

    return loss


def edge_op(case: dict[str, Any], **settings: Any) -> optloss.TrainOp:
    return optloss.optimize_loss(
        edge_loss(case["k_on"]),
        case["initial_global_step"],
        case["learning_rate"],
        case["optimizer"],
        gradient_multipliers=case["multipliers"] and {k: np.asarray(v) for k, v in case["multipliers"].items()},
        clip_gradients=clip_of(case["clip"]),
        increment_global_step=case["increment_global_step"],
        **settings,
    )


def run_edge(case: dict[str, Any], **settings: Any) -> list[tuple[optloss.TrainState, optloss.TrainOutput]]:
    train = edge_op(case, **settings)
    state = train.init({"w": np.asarray(case["initial_w"], np.float32), "b": np.float32(case["initial_b"])})
    steps = []
    for k in case["k"]:
        state, out = train.update(state, np.float32(k))
        steps.append((jax.device_get(state), jax.device_get(out)))
    return steps


def check_edge(case: dict[str, Any], steps: list[tuple[Any, Any]]) -> None:
    for row, (state, out) in zip(case["rows"], steps, strict=True):
        np.testing.assert_allclose(out.loss, row["loss"], rtol=2e-5)
        np.testing.assert_allclose(state.params["w"], row["w"], rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(state.params["b"], row["b"], rtol=1e-5, atol=2e-6)
        assert int(state.global_step) == row["global_step"]
        if np.all(np.isfinite(list(row.get("adaptive_state", {}).values()))) and "adaptive_state" in row:
            check_adaptive(state.opt_states["OptimizeLoss"].clip, row["adaptive_state"])


@pytest.mark.parametrize("name", sorted(set(EDGES) - MENDED_BY_AN_ERROR - MENDED_BY_THE_NORM - NONFINITE))
def test_optimize_loss_does_at_an_edge_what_the_original_did(name: str) -> None:
    check_edge(EDGES[name], run_edge(EDGES[name]))


@pytest.mark.parametrize("name", sorted(NONFINITE))
def test_nonfinite_apply_does_with_a_bad_gradient_what_the_original_did(name: str) -> None:
    """Parameters, loss and step alone: the clip's averages stay finite, which is mended in any case."""
    check_edge(EDGES[name], run_edge(EDGES[name], nonfinite="apply"))


@pytest.mark.parametrize("name", sorted(NONFINITE))
def test_a_nonfinite_step_leaves_everything_but_its_count_as_it_was(name: str) -> None:
    case = EDGES[name]
    steps = run_edge(case)
    good = [k for k in case["k"] if np.isfinite(k)]
    skipped = len(case["k"]) - len(good)
    state = steps[-1][0]
    assert int(state.opt_states["OptimizeLoss"].nonfinite_steps) == skipped > 0
    without = (
        run_edge({**case, "k": good})[-1][0]
        if good
        else edge_op(case).init({"w": np.asarray(case["initial_w"], np.float32), "b": np.float32(case["initial_b"])})
    )
    op_state = state.opt_states["OptimizeLoss"]._replace(nonfinite_steps=np.int32(0))
    chex.assert_trees_all_equal(state._replace(opt_states={"OptimizeLoss": op_state}), jax.device_get(without))


@pytest.mark.parametrize("name", sorted(MENDED_BY_AN_ERROR))
def test_a_setting_that_the_original_let_pass_is_a_value_error(name: str) -> None:
    argument = "clip_gradients" if name.startswith("clip") else "learning_rate"
    with pytest.raises(ValueError, match=rf"^{argument}: got (-1.0|nan|inf); a "):
        edge_op(EDGES[name])


def test_a_norm_whose_squares_overflow_is_clipped_to_the_limit() -> None:
    """The gradient is 1e30 * (3, 1, 4, 2): clipped to norm 1 it is (3, 1, 4, 2) / sqrt(30)."""
    ((state, _),) = run_edge(EDGES["overflow_norm_clip"])
    w, b = np.array([3.0, 1.0, 4.0]), 1.0
    np.testing.assert_allclose(state.params["w"], w - 0.1 * w / np.sqrt(30), rtol=1e-6)
    np.testing.assert_allclose(state.params["b"], b - 0.1 * 2 / np.sqrt(30), rtol=1e-6)


@pytest.mark.parametrize(("name", "factor"), [("clip_zero_zero_gradient", 1.0), ("clip_inf", 0.9)])
def test_a_limit_of_which_the_original_made_nan_is_a_limit(name: str, factor: float) -> None:
    """A zero gradient moves nothing; without a limit the step is w - 0.1 * w."""
    ((state, _),) = run_edge(EDGES[name])
    np.testing.assert_allclose(state.params["w"], factor * np.array([3.0, 0.0, 4.0]), rtol=1e-6)


@pytest.mark.parametrize(
    "row", read_golden("summary_tags.json")["rows"], ids=lambda row: f"{row['summaries']}-{row['clip']}-{row['decay']}"
)
def test_summaries_have_the_original_tags(row: dict[str, Any]) -> None:
    """The original's "gradients/a_0" is "gradients/a" here, under the scope."""
    clip = optloss.adaptive_clipping_fn() if row["clip"] == "adaptive" else row["clip"]
    decay = (lambda rate, step: optloss.exponential_decay(rate, step, 10, 0.5)) if row["decay"] else None
    train = optloss.optimize_loss(
        lambda params: jnp.sum(params["a"] ** 2) + params["b"]["c"] ** 2,
        0,
        0.1,
        "SGD",
        clip_gradients=clip,
        learning_rate_decay_fn=decay,
        summaries=row["summaries"],
        name="scope",
    )
    _, out = train.update(train.init({"a": np.ones(2, np.float32), "b": {"c": np.float32(1)}}))
    kinds = {tag: "histogram" if isinstance(v, optloss.Histogram) else "scalar" for tag, v in out.summaries.items()}
    assert kinds == {f"scope/{tag.removesuffix('_0')}": kind for tag, kind in row["tags"]}
