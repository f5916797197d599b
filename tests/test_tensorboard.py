"""Summaries written through a real writer and read back as TensorBoard reads them."""

import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

import optloss
from optloss import tensorboard

# The limits of TensorFlow's buckets are 1e-12 times the powers of 1.1. ln(1e12 * x) / ln(1.1) is 282.63 at 0.5, 289.90
# at 1 and 301.43 at 3, and so the first limits above are the powers 283, 290 and 302, and those below are one less.
LIMITS = [1e-12 * 1.1**power for power in (282, 283, 289, 290, 301, 302)]


def read_back(folder: Path, steps: dict[int, dict[str, Any]]) -> EventAccumulator:
    """The events of a log of the summaries of these steps."""
    with SummaryWriter(str(folder)) as writer:
        for step, summaries in steps.items():
            tensorboard.write_summaries(writer, summaries, step)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def tags_by_kind(events: EventAccumulator) -> dict[str, list[str]]:
    """The tags of each kind that there is; "distributions" are the reader's second view of the histograms."""
    return {kind: tags for kind, tags in events.Tags().items() if tags and kind != "distributions"}


class RecordingWriter:
    """Keeps what it is called with."""

    def __init__(self) -> None:
        """Starts with no calls."""
        self.scalars: list[tuple[Any, ...]] = []
        self.histograms: list[tuple[str, dict[str, Any]]] = []

    def add_scalar(self, *args: Any) -> None:
        """Keeps a scalar."""
        self.scalars.append(args)

    def add_histogram_raw(self, tag: str, **fields: Any) -> None:
        """Keeps a histogram."""
        self.histograms.append((tag, fields))


def test_write_summaries_writes_scalars_under_their_tags_and_steps(tmp_path: Path) -> None:
    """Quarters, so that float32 has them exactly."""
    events = read_back(
        tmp_path,
        {
            3: {"OptimizeLoss/loss": jnp.float32(0.25), "OptimizeLoss/learning_rate": jnp.float32(0.5)},
            7: {"OptimizeLoss/loss": jnp.float32(-1.75), "OptimizeLoss/learning_rate": jnp.float32(0.125)},
        },
    )
    read = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read == {
        "OptimizeLoss/loss": [(3, 0.25), (7, -1.75)],
        "OptimizeLoss/learning_rate": [(3, 0.5), (7, 0.125)],
    }
    assert tags_by_kind(events).keys() == {"scalars"}


def test_write_summaries_writes_a_histogram_as_tensorflow_keeps_it(tmp_path: Path) -> None:
    """1, 1, 0.5 and 3: their sum is 5.5 and that of their squares 11.25; a run of empty buckets is one."""
    histogram = optloss.histogram(jnp.array([1.0, 3.0, 0.5, 1.0]))
    events = read_back(tmp_path, {5: {"OptimizeLoss/gradients/w": histogram}})
    assert tags_by_kind(events) == {"histograms": ["OptimizeLoss/gradients/w"]}
    (event,) = events.Histograms("OptimizeLoss/gradients/w")
    value = event.histogram_value
    assert (event.step, value.min, value.max, value.num) == (5, 0.5, 3.0, 4)
    assert (value.sum, value.sum_squares) == (5.5, 11.25)
    assert list(value.bucket) == [0, 1, 0, 2, 0, 1]
    np.testing.assert_allclose(value.bucket_limit, LIMITS, rtol=1e-6)


def test_write_summaries_writes_no_tag_that_is_not_in_the_summaries_of_a_step(tmp_path: Path) -> None:
    """Everything that a step can report, with the loss w^2 / 2 at w = 2: the gradient is 2."""
    train = optloss.optimize_loss(
        lambda params: params["w"] ** 2 / 2, 0, 0.5, "SGD", summaries=optloss.OPTIMIZER_SUMMARIES, clip_gradients=1.0
    )
    _, output = train.update(train.init({"w": 2.0}))
    events = read_back(tmp_path, {0: output.summaries})
    tags = tags_by_kind(events)
    assert {*tags["scalars"], *tags["histograms"]} == set(output.summaries)
    assert tags["histograms"] == ["OptimizeLoss/gradients/w"]
    assert tags.keys() == {"scalars", "histograms"}
    assert events.Scalars("OptimizeLoss/loss")[0].value == 2.0
    assert events.Scalars("OptimizeLoss/global_norm/gradient_norm")[0].value == 2.0
    assert events.Histograms("OptimizeLoss/gradients/w")[0].histogram_value.sum == 1.0  # clipped


def test_write_summaries_writes_what_is_not_finite_as_it_is(tmp_path: Path) -> None:
    """A run that goes wrong has to show it."""
    events = read_back(tmp_path, {0: {"nan": jnp.float32(math.nan), "inf": jnp.float32(-math.inf)}})
    assert math.isnan(events.Scalars("nan")[0].value)
    assert events.Scalars("inf")[0].value == -math.inf


def test_write_summaries_leaves_out_a_histogram_without_values() -> None:
    """One of no elements, and one of elements that are not finite."""
    writer = RecordingWriter()
    histograms = {"none": optloss.histogram(jnp.zeros(0)), "nan": optloss.histogram(jnp.full(3, math.nan))}
    tensorboard.write_summaries(writer, histograms, 0)
    assert not writer.histograms


def test_write_summaries_keeps_every_count_of_a_histogram_on_both_sides_of_zero() -> None:
    """The counts sum to the number of values, and each value has a bucket that ends above it and starts not above."""
    values = np.array([-1e19, -3.0, -1e-13, 0.0, 0.0, 1e-30, 2e-12, 7.0, 1e19], np.float32)
    writer = RecordingWriter()
    tensorboard.write_summaries(writer, {"h": optloss.histogram(jnp.asarray(values))}, 0)
    ((tag, fields),) = writer.histograms
    assert tag == "h"
    counts, limits = fields["bucket_counts"], fields["bucket_limits"]
    assert counts[0] == 0
    assert counts[-1] > 0
    expected = [int(np.sum((values >= low) & (values < high))) for low, high in itertools.pairwise(limits)]
    assert counts[1:] == expected
    assert sum(counts) == 9


def test_write_summaries_hands_the_writer_python_numbers_in_the_order_of_the_tags() -> None:
    """Writers need know no JAX, and `step` may be the state's counter."""
    writer = RecordingWriter()
    tensorboard.write_summaries(writer, {"b": jnp.float32(1.5), "a": jnp.int32(2)}, jnp.int32(4))
    assert writer.scalars == [("b", 1.5, 4), ("a", 2.0, 4)]
    assert [type(argument) for argument in writer.scalars[0]] == [str, float, int]


def test_write_summaries_transfers_from_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tags and the step together."""
    transfers = []
    monkeypatch.setattr(jax, "device_get", lambda tree: transfers.append(tree) or jax.tree.map(np.asarray, tree))
    summaries = {"a": jnp.float32(1), "b": jnp.float32(2), "h": optloss.histogram(jnp.ones(2))}
    tensorboard.write_summaries(RecordingWriter(), summaries, jnp.int32(0))
    assert len(transfers) == 1


@pytest.mark.parametrize(
    ("summaries", "shown"),
    [
        ({"a": jnp.zeros(3), "b": jnp.zeros(2)}, r"'a' of shape \(3,\), 'b' of shape \(2,\)"),
        ({"a": jnp.zeros(3), "h": optloss.histogram(jnp.ones(2))}, r"'a' of shape \(3,\), 'h' of shape \(\)"),
        ({"a": jnp.zeros((3, 2))}, r"'a' of shape \(3, 2\)"),
    ],
)
def test_write_summaries_refuses_shapes_that_are_not_of_one_stack(summaries: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=rf"summaries: got {shown}; scalars, or all stacked along one axis"):
        tensorboard.write_summaries(RecordingWriter(), summaries, 0)


def test_write_summaries_writes_stacked_steps_one_after_the_other() -> None:
    """As `jax.lax.scan` stacks them; the sums of the histograms are 2 and 6."""
    stacked = {"loss": jnp.array([1.0, 2.0]), "h": jax.vmap(optloss.histogram)(jnp.array([[1.0, 1.0], [2.0, 4.0]]))}
    writer = RecordingWriter()
    tensorboard.write_summaries(writer, stacked, 9)
    assert writer.scalars == [("loss", 1.0, 9), ("loss", 2.0, 10)]
    assert [(fields["global_step"], fields["sum"]) for _, fields in writer.histograms] == [(9, 2.0), (10, 6.0)]
