"""What a picture of a run shows, read from its axes."""

import importlib
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from optloss import pictures

NAN = float("nan")


def run(steps: int, name: str = "OptimizeLoss") -> dict[str, Any]:
    """The summaries of a run whose every fifth step is clipped to 2 and whose third is skipped."""
    norms = np.where(np.arange(steps) % 5 == 4, 4.0, 1.0)
    scope = f"{name}/global_norm"
    return {
        f"{name}/loss": np.linspace(8.0, 4.0, steps),
        f"{name}/learning_rate": np.full(steps, 0.1),
        f"{scope}/gradient_norm": norms,
        f"{scope}/clipped_gradient_norm": np.minimum(norms, 2.0),
        f"{scope}/adaptive_max_gradient_norm": np.full(steps, 2.0),
        f"{name}/nonfinite_steps": (np.arange(steps) >= 2).astype(int),
        f"{name}/gradient_norm/w": norms,
    }


def panels(history: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The axes of a picture by their labels."""
    return {axes.get_ylabel(): axes for axes in pictures.draw_run(history, *args, **kwargs).axes}


def curves(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def bars(axes: Any) -> list[Any]:
    """The vertical lines of a panel, each [[x, bottom], [x, top]]."""
    found = [path.vertices for collection in axes.collections for path in collection.get_paths()]
    return np.array(found).tolist()


def test_a_short_run_is_drawn_as_it_is() -> None:
    history, at = run(10), np.arange(100, 110)
    drawn = panels(history, at)
    assert list(drawn) == ["loss", "learning rate", "gradient norm", "clipped steps"]
    np.testing.assert_array_equal(curves(drawn["loss"])["loss"], np.stack([at, history["OptimizeLoss/loss"]], 1))
    (rate,) = curves(drawn["learning rate"]).values()
    np.testing.assert_array_equal(rate[:, 1], 0.1)
    norms = curves(drawn["gradient norm"])
    np.testing.assert_array_equal(norms["adaptive limit"][:, 1], 2.0)
    np.testing.assert_array_equal(norms["before, where clipped"], [[104, 4], [109, 4]])
    np.testing.assert_array_equal(norms["after clipping"][[3, 4, 5], 1], [1, 2, 1])
    assert bars(drawn["gradient norm"]) == [[[104, 2], [104, 4]], [[109, 2], [109, 4]]]
    assert {axes.get_xlabel() for axes in drawn.values()} == {"step"}


def test_the_shares_of_clipped_and_the_number_of_skipped_steps_are_told() -> None:
    counts = panels(run(100))["clipped steps"]
    shares = curves(counts)
    assert [label for label in shares if not label.startswith("_")] == ["of 5 steps around", "of all: 20.0 %"]
    np.testing.assert_allclose(shares["of 5 steps around"][2:-2, 1], 0.2)  # of any five one is clipped
    assert bars(counts) == [[[2, 0], [2, 1]]]
    assert "skipped: 1" in counts.get_legend_handles_labels()[1]


def test_rows_of_an_async_writer_draw_what_stacked_arrays_draw() -> None:
    stacked = run(10)
    rows = [{tag: column[i] for tag, column in stacked.items()} for i in range(10)]
    a, b = panels(stacked), panels(rows)
    for label, axes in a.items():
        for (name, x), y in zip(curves(axes).items(), curves(b[label]).values(), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


def test_a_long_curve_has_the_mean_around_each_step_without_what_is_not_finite() -> None:
    losses = np.tile([1.0, 2.0, 3.0], 100)
    losses[150] = NAN
    (whole, pale), (name, mean) = curves(panels({"OptimizeLoss/loss": losses})["loss"]).items()
    assert (whole.startswith("_"), name) == (True, "loss, mean of 6 steps")
    np.testing.assert_array_equal(pale[:, 1], losses)
    np.testing.assert_allclose(mean[[100, 200], 1], 2.0)  # each three in a row have the mean of 2
    np.testing.assert_allclose(mean[150, 1], (2 + 3 + 1 + 2 + 3) / 5)
    assert np.all(np.isfinite(mean))


def test_a_stretch_without_a_finite_value_is_a_gap() -> None:
    losses = np.where(np.arange(300) < 100, NAN, 1.0)
    *_, mean = curves(panels({"OptimizeLoss/loss": losses})["loss"]).values()
    assert np.all(np.isnan(mean[:90, 1]))
    np.testing.assert_allclose(mean[110:, 1], 1.0)


def test_an_axis_is_logarithmic_where_positive_values_reach_over_more_than_a_power_of_ten() -> None:
    def scale(*losses: float) -> str:
        return str(panels({"OptimizeLoss/loss": np.array(losses)})["loss"].get_yscale())

    assert [scale(1, 11), scale(1, 11, NAN), scale(1, 9), scale(-1, 11), scale(0, 11), scale(NAN, NAN)] == [
        *("log", "log"),
        *("linear",) * 4,
    ]


def test_panels_are_those_of_the_figures_that_there_are() -> None:
    full = run(10)
    some = {tag: full[tag] for tag in ("OptimizeLoss/global_norm/gradient_norm", "OptimizeLoss/nonfinite_steps")}
    drawn = panels(some)
    assert list(drawn) == ["gradient norm", "skipped steps"]
    assert list(curves(drawn["gradient norm"])) == ["before clipping"]
    three = {tag: values for tag, values in full.items() if "learning" not in tag and "nonfinite" not in tag}
    assert list(panels(three)) == ["loss", "gradient norm", "clipped steps"]
    unclipped = {tag: np.minimum(values, 1.0) for tag, values in full.items()}
    assert "gradients" in curves(panels(unclipped)["gradient norm"])


def test_one_op_of_several_is_drawn_in_a_figure_that_is_given() -> None:
    both, figure = run(10, "g") | run(10, "d"), Figure()
    assert pictures.draw_run(both, name="d", figure=figure) is figure
    assert len(figure.axes) == 4
    with pytest.raises(ValueError, match=r"^name: got None, and the history has those of \['d', 'g'\]"):
        pictures.draw_run(both)


@pytest.mark.parametrize(
    ("history", "options", "message"),
    [
        ([], {}, "history: got an empty one"),
        ({}, {}, "history: got an empty one"),
        ({"accuracy": [1.0]}, {}, r"history: got the tags \['accuracy'\], none of which can be drawn"),
        (run(3), {"name": "other"}, "history: got the tags .* for the name 'other'"),
        (run(3), {"steps": [1, 2]}, r"history: 'steps' has the shape \(2,\), where \(3,\) would do"),
        (run(3) | {"OptimizeLoss/loss": [1.0, 2.0]}, {}, r"history: '\w+' has the shape \(3,\), where \(2,\) would"),
    ],
)
def test_what_cannot_be_drawn_is_named(history: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        pictures.draw_run(history, **options)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "optloss.pictures")
    with pytest.raises(ImportError, match=r"^optloss.pictures: pip install 'optloss\[pictures\]' would do"):
        importlib.import_module("optloss.pictures")
