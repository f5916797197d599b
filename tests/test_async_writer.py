"""Summaries written beside the training: what is written, what is lost, and that nothing waits for it."""

import contextlib
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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
from optloss.tensorboard import AsyncWriter, EventFileWriter, ProgressBar


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Is closed until the test, or its end, opens it."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_async_writer_hands_a_function_floats_in_the_order_of_the_steps() -> None:
    rows: list[Any] = []
    with AsyncWriter(lambda values, step: rows.append((values, step))) as writer:
        for step in range(100):
            writer.write({"b": jnp.float32(step / 2), "a": 3}, step)
    assert rows == [({"b": step / 2, "a": 3.0}, step) for step in range(100)]
    assert [type(value) for value in rows[1][0].values()] == [float, float]
    assert list(rows[0][0]) == ["b", "a"]
    assert writer.dropped == 0


def test_async_writer_hands_a_function_histograms_of_numpy_arrays() -> None:
    rows: list[Any] = []
    with AsyncWriter(lambda values, step: rows.append(values["h"])) as writer:
        writer.write({"h": optloss.histogram(jnp.array([1.0, 2.0]))}, 0)
    assert rows[0].sum == 3
    assert isinstance(rows[0].bucket, np.ndarray)


def test_async_writer_writes_multiples_of_every_alone_stacked_or_not() -> None:
    rows: list[int] = []
    with AsyncWriter(lambda values, step: rows.append((step, values["a"])), every=3) as writer:
        for step in range(7):
            writer.write({"a": jnp.float32(step)}, step)
        writer.write({"a": jnp.arange(7.0, 12.0)}, 7)
    assert rows == [(0, 0.0), (3, 3.0), (6, 6.0), (9, 9.0)]


def test_async_writer_writes_a_whole_training_into_what_tensorboard_reads(tmp_path: Path) -> None:
    """Each step, w - 0.25 * 2w, halves w, from 2: the losses are quarters of each other."""
    train = optloss.optimize_loss(lambda w: w**2, 0, 0.25, "SGD", summaries=["loss", "gradients"])
    state = train.init(2.0)
    with AsyncWriter(EventFileWriter(tmp_path)) as writer:
        for step in range(5):
            state, output = train.update(state)
            writer.write(output.summaries, step)
    assert scalars(tmp_path) == {"OptimizeLoss/loss": [(step, 4.0 / 4**step) for step in range(5)]}
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    histograms = events.Histograms("OptimizeLoss/gradients/params")
    assert [(event.step, event.histogram_value.sum) for event in histograms] == [(i, 4.0 / 2**i) for i in range(5)]


def test_async_writer_waits_neither_for_the_device_nor_for_its_sinks(gate: threading.Event) -> None:
    """A value that the device works on for a second or so, and a sink that does not pass before the gate opens."""
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda i, x: jnp.tanh(x @ x), x).sum())
    square, rows = jnp.ones((500, 500)), []
    jax.block_until_ready(slow(square))  # compiled
    writer = AsyncWriter(lambda values, step: gate.wait(20), lambda values, step: rows.append(step))
    value = slow(square)
    for step in range(50):
        writer.write({"a": value}, step)
    assert not value.is_ready()
    assert rows == []
    gate.set()
    writer.close()
    assert (len(rows), writer.dropped) == (50, 0)


def test_async_writer_counts_what_a_full_queue_does_not_take(gate: threading.Event) -> None:
    """One is being written, two wait, and the other seven of ten are lost."""
    began, rows = threading.Event(), []

    def sink(values: Any, step: int) -> None:
        began.set()
        gate.wait(20)
        rows.append(step)

    writer = AsyncWriter(sink, capacity=2)
    writer.write({"a": 0.0}, 0)
    assert began.wait(20)
    for step in range(1, 10):
        writer.write({"a": 0.0}, step)
    assert writer.dropped == 7
    gate.set()
    with pytest.warns(RuntimeWarning, match=r"summaries: 7 writes were lost; a sink was too slow"):
        writer.close()
    assert rows == [0, 1, 2]


def test_async_writer_goes_on_after_a_sink_that_raises_and_tells_at_the_end() -> None:
    rows: list[int] = []

    def breaks(values: Any, step: int) -> None:
        if step % 2:
            raise OSError(f"no space for {step}")

    writer = AsyncWriter(breaks, lambda values, step: rows.append(step))
    for step in range(6):
        writer.write({"a": 0.0}, step)
    with pytest.warns(RuntimeWarning, match=r"summaries: 3 writes were lost; OSError: no space for 5"):
        writer.close()
    assert writer.dropped == 3
    assert rows == [0, 1, 2, 3, 4, 5]
    writer.close()  # a second time it does nothing, and warns of nothing


def test_async_writer_tells_of_a_sink_that_cannot_be_closed() -> None:
    class Sink:
        """Which has lost its disk."""

        def __call__(self, values: Any, step: int) -> None:
            """Fails at the second."""
            if step:
                raise OSError("no space")

        def close(self) -> None:
            """Fails too."""
            raise OSError("no disk")

    writer = AsyncWriter(Sink())
    writer.write({"a": 0.0}, 0)
    writer.write({"a": 0.0}, 1)
    with pytest.warns(RuntimeWarning, match=r"summaries: 1 writes were lost; OSError: no disk"):
        writer.close()


def test_async_writer_closes_within_its_time_where_a_sink_hangs(gate: threading.Event) -> None:
    writer = AsyncWriter(lambda values, step: gate.wait(60), capacity=2)
    for step in range(3):
        writer.write({"a": 0.0}, step)
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"summaries: 3 writes were lost"):
        writer.close(timeout=0.2)
    assert time.monotonic() - start < 10


def test_async_writer_closes_its_sinks() -> None:
    closed: list[str] = []

    class Sink:
        """A function with an end."""

        def __call__(self, values: Any, step: int) -> None:
            """Does nothing."""

        def close(self) -> None:
            """Notes it."""
            closed.append("closed")

    with AsyncWriter(Sink(), Sink()):
        pass
    assert closed == ["closed", "closed"]


def test_only_process_0_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    rows: list[int] = []
    with AsyncWriter(EventFileWriter(tmp_path / "log"), lambda values, step: rows.append(step)) as writer:
        writer.write({"a": 0.0}, 0)
    with contextlib.closing(EventFileWriter(tmp_path / "log")) as alone:
        alone.add_scalar("a", 0.0, 0)
    assert rows == []
    assert not (tmp_path / "log").exists()


def test_async_writer_works_with_tensorboardx(tmp_path: Path) -> None:
    with AsyncWriter(SummaryWriter(str(tmp_path))) as writer:
        writer.write({"a": jnp.float32(0.5), "h": optloss.histogram(jnp.ones(2))}, 4)
    assert scalars(tmp_path) == {"a": [(4, 0.5)]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("runs",),
            TypeError,
            r"sinks: got 'runs' of type str; an object with add_scalar .* EventFileWriter\(folder\)",
        ),
        ((None,), TypeError, "sinks: got None of type NoneType"),
    ],
)
def test_async_writer_refuses_what_is_no_sink(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AsyncWriter(*arguments)


@pytest.mark.parametrize("setting", [{"every": 0}, {"every": 2.0}, {"capacity": 0}, {"every": True}])
def test_async_writer_refuses_settings_that_are_no_count(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}: got {value}; an integer >= 1 would do."):
        AsyncWriter(**setting)


def test_async_writer_refuses_a_step_that_it_would_have_to_wait_for() -> None:
    with AsyncWriter() as writer:
        with pytest.raises(TypeError, match=r"step: got Array\(3, .*to read one from a device is to wait for it"):
            writer.write({}, jnp.int32(3))
        with pytest.raises(TypeError, match=r"step: got 1.5 of type float; an integer of the host's would do"):
            writer.write({}, 1.5)
        writer.write({}, np.int64(3))


def test_async_writer_refuses_to_stand_inside_jit() -> None:
    with AsyncWriter() as writer, pytest.raises(TypeError, match=r"summaries: 'a' is traced; return it"):
        jax.jit(lambda x: writer.write({"a": x}, 0))(1.0)


def test_async_writer_refuses_writes_after_its_end() -> None:
    with AsyncWriter() as writer:
        pass
    with pytest.raises(ValueError, match="AsyncWriter: it is closed; a new one would do"):
        writer.write({"a": 0.0}, 0)


def test_a_run_that_is_resumed_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """The second began again at step 2; what its own first file has from there on is forgotten."""
    for first, value in ((0, 1.0), (2, 5.0)):
        with AsyncWriter(EventFileWriter(tmp_path, purge_step=first)) as writer:
            for step in range(first, first + 4):
                writer.write({"a": value}, step)
    assert scalars(tmp_path) == {"a": [(0, 1.0), (1, 1.0), (2, 5.0), (3, 5.0), (4, 5.0), (5, 5.0)]}


def test_an_event_file_writes_what_is_not_finite_as_it_is(tmp_path: Path) -> None:
    writer = EventFileWriter(tmp_path)
    tensorboard.write_summaries(writer, {"nan": jnp.float32(math.nan), "inf": jnp.float32(-math.inf)}, 0)
    writer.close()
    read = scalars(tmp_path)
    assert math.isnan(read["nan"][0][1])
    assert read["inf"] == [(0, -math.inf)]


def test_an_event_file_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ImportError, match=r"pip install 'optloss\[tensorboard\]' would do"):
        EventFileWriter(tmp_path)


class Bar:
    """Looks like tqdm's."""

    def __init__(self) -> None:
        """Begins at 0."""
        self.n, self.shown, self.is_closed = 0, {}, False

    def update(self, n: int) -> None:
        """Goes on."""
        self.n += n

    def set_postfix(self, shown: dict[str, str], refresh: bool) -> None:
        """Keeps it."""
        self.shown = shown

    def close(self) -> None:
        """Notes it."""
        self.is_closed = True


def test_a_progress_bar_ends_at_the_last_step_with_its_values() -> None:
    bar = Bar()
    with AsyncWriter(ProgressBar(bar)) as writer:
        for step in range(50):
            norms = {"d/global_norm/gradient_norm": 2.0, "d/global_norm/clipped_gradient_norm": 1.0}
            writer.write({"d/loss": step, "d/gradient_norm/loss_layer": 9.0, **norms, "accuracy": 0.25}, step)
    assert bar.shown == {"loss": "49", "gradient_norm": "2", "accuracy": "0.25"}
    assert bar.n == 50
    assert bar.is_closed


def test_a_progress_bar_names_the_ops_where_there_are_several() -> None:
    bar = Bar()
    ProgressBar(bar)({"d/loss": 1.0, "g/loss": 2.0}, 0)
    assert bar.shown == {"d loss": "1", "g loss": "2"}


# A process whose files may not grow past `limit`, as on a disk that is full.
FULL = """
import resource, signal, sys, warnings
import jax.numpy as jnp
from optloss import tensorboard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def allow(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
rows, folder = [], sys.argv[1]
allow(2000)
writer = tensorboard.AsyncWriter(tensorboard.EventFileWriter(folder), lambda values, step: rows.append(step))
for step in range(100):
    writer.write({"a": jnp.float32(step)}, step)
while len(rows) < 100 or writer._lanes[0].given > writer._lanes[0].written + writer._lanes[0].failed: pass
if sys.argv[2] == "again":
    allow(resource.RLIM_INFINITY)
    writer.write({"a": jnp.float32(100)}, 100)
    writer.close()
print("steps", len(rows), "dropped", writer.dropped)
"""


def run(program: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "again"])
def test_a_full_disk_costs_summaries_and_not_the_run(tmp_path: Path, end: str) -> None:
    """The file has whole events up to its end, and goes on where there is room again."""
    done = run(FULL, tmp_path, end)
    last = [(100, 100.0)] if end == "again" else []
    words = done.stdout.split()
    kept = 101 - int(words[3]) if end == "again" else 100 - int(words[3])
    assert 20 < kept < 80  # an event of a scalar takes some 40 bytes of the 2000
    assert scalars(tmp_path)["a"] == [(i, float(i)) for i in range(kept - len(last))] + last
    assert f"{words[3]} writes were lost; OSError: [Errno 27] File too large" in done.stderr
    assert done.stderr.count("RuntimeWarning") == 1


@pytest.mark.slow
def test_what_is_queued_is_written_when_python_exits(tmp_path: Path) -> None:
    program = """
import sys, time
import jax.numpy as jnp
from optloss import tensorboard
file = tensorboard.EventFileWriter(sys.argv[1])
writer = tensorboard.AsyncWriter(lambda values, step: (time.sleep(0.01), file.add_scalar("a", values["a"], step)))
for step in range(50):
    writer.write({"a": jnp.float32(step)}, step)
"""
    assert run(program, tmp_path).stderr == ""
    assert scalars(tmp_path) == {"a": [(step, float(step)) for step in range(50)]}
