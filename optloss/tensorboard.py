"""Summaries into TensorBoard, or wherever the user's writer puts them, beside the training and never in its way."""

import atexit
import contextlib
import io
import itertools
import os
import queue
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self, TypeAlias

import jax
import numpy as np
from jax.typing import ArrayLike

from optloss._check import check_number
from optloss._histogram import Histogram

__all__ = ["AsyncWriter", "EventFileWriter", "ProgressBar", "write_summaries"]


class _Writer(Protocol):
    """What a writer has to have; a `tensorboardX.SummaryWriter` has it too."""

    def add_scalar(self, tag: str, *args: Any, **kwargs: Any) -> Any: ...

    def add_histogram_raw(self, tag: str, *args: Any, **kwargs: Any) -> Any: ...


_Summaries: TypeAlias = Mapping[str, ArrayLike | Histogram]
_Sink: TypeAlias = _Writer | Callable[[dict[str, Any], int], Any]


class AsyncWriter:
    """Writes summaries in the background: `write` hands them over and waits for neither device nor disk.

    Each sink has a thread and a queue of its own. One that fails, hangs or falls behind costs its own summaries, which
    `dropped` counts and a warning at the end tells of, and never the training. Only process 0 writes. What is queued
    gets written at the latest when the writer is closed: by `with`, by `close`, or when Python exits.

    Args:
        *sinks: Writers with `add_scalar` and `add_histogram_raw`, such as an `EventFileWriter` or a
            `tensorboardX.SummaryWriter`; or functions of `(values, step)`, such as `wandb.log`, where `values` is a
            dict of floats, and of `Histogram`s of NumPy arrays where histograms were asked for. What has a `close` is
            closed.
        every: Writes the steps that are multiples of this.
        capacity: How many calls of `write` a queue holds. What comes when it is full is dropped.

    Raises:
        TypeError: A sink that is neither.
        ValueError: `every` or `capacity` is no integer above 0.

    Example:
        >>> from optloss import tensorboard
        >>> train = optloss.optimize_loss(lambda w: w**2, 0, 0.25, "SGD", summaries=["loss"])
        >>> state, history = train.init(2.0), []
        >>> with tensorboard.AsyncWriter(lambda values, step: history.append((step, values)), every=2) as writer:
        ...     for step in range(4):
        ...         state, out = train.update(state)
        ...         writer.write(out.summaries, step)
        >>> history
        [(0, {'OptimizeLoss/loss': 4.0}), (2, {'OptimizeLoss/loss': 0.25})]

    TF1's hooks wrote in the training loop, after the step had come to the host.
    """

    def __init__(self, *sinks: _Sink, every: int = 1, capacity: int = 1000) -> None:
        """Starts the threads."""
        for sink in sinks:
            if not callable(sink) and not (hasattr(sink, "add_scalar") and hasattr(sink, "add_histogram_raw")):
                raise TypeError(
                    f"sinks: got {sink!r} of type {type(sink).__name__}; an object with add_scalar and "
                    "add_histogram_raw, such as EventFileWriter(folder), or a function of (values, step) would do."
                )
        self._every, capacity = _check_count("every", every), _check_count("capacity", capacity)
        self._lanes = [_Lane(sink, self._every, capacity) for sink in sinks]
        self._is_closed = False
        atexit.register(self.close)

    def write(self, summaries: _Summaries, step: int) -> None:
        """Hands over the summaries of a step, or those of several, stacked as `jax.lax.scan` gives them.

        Args:
            summaries: `output.summaries`, and whatever else: `{**output.summaries, "accuracy": output.aux}`.
            step: The step, or the first of them: an integer of the host's, since reading another would wait for it.

        Raises:
            TypeError: `step` is no integer of the host's, or `summaries` are traced: `write` stands inside jit.
            ValueError: The writer is closed, or shapes are not those of one stack.
        """
        if not isinstance(step, int | np.integer):
            raise TypeError(
                f"step: got {step!r} of type {type(step).__name__}; an integer of the host's would do: to read one "
                "from a device is to wait for it."
            )
        first, count = int(step), _count_steps(summaries)
        if self._is_closed:
            raise ValueError("AsyncWriter: it is closed; a new one would do.")
        if jax.process_index() == 0 and any((first + i) % self._every == 0 for i in range(count or 1)):
            for lane in self._lanes:
                lane.put(dict(summaries), first)

    @property
    def dropped(self) -> int:
        """How many calls of `write` are lost so far, of all sinks together."""
        return sum(lane.refused + lane.failed + lane.left for lane in self._lanes)

    def close(self, timeout: float = 10.0) -> None:
        """Waits for what is queued, at most `timeout` seconds for a sink, and warns if something was lost."""
        check_number("timeout", timeout, at_least=0)
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        for lane in self._lanes:
            lane.finish(timeout)
        if self.dropped or any(lane.error for lane in self._lanes):
            reasons = [f"{type(lane.error).__name__}: {lane.error}" for lane in self._lanes if lane.error]
            reason = reasons[0] if reasons else "a sink was too slow"
            warnings.warn(f"summaries: {self.dropped} writes were lost; {reason}", RuntimeWarning, stacklevel=2)

    def __enter__(self) -> Self:
        """The writer."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes it."""
        self.close()


class _Lane:
    """A sink, its queue, and the thread that empties it: a daemon, so that one that hangs holds up no exit."""

    def __init__(self, sink: _Sink, every: int, capacity: int) -> None:
        self.sink, self.every = sink, every
        self.given = self.written = 0
        self.refused = self.failed = self.left = 0  # by a full queue, by an error, when time was up
        self.error: Exception | None = None
        self.waiting: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(capacity)
        self.thread = threading.Thread(target=self._run, name="optloss summaries", daemon=True)
        self.thread.start()

    def put(self, summaries: dict[str, Any], step: int) -> None:
        self.given += 1
        try:
            self.waiting.put_nowait((summaries, step))
        except queue.Full:
            self.refused += 1

    def finish(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        with contextlib.suppress(queue.Full):
            self.waiting.put(None, timeout=timeout)
        self.thread.join(max(0.0, end - time.monotonic()))
        self.left = self.given - self.refused - self.failed - self.written

    def _run(self) -> None:
        while (item := self.waiting.get()) is not None:
            try:
                for values, step in _rows(*item):
                    if step % self.every == 0:
                        _write_row(self.sink, values, step)
                self.written += 1
            except Exception as error:
                self.failed, self.error = self.failed + 1, error
        try:
            getattr(self.sink, "close", lambda: None)()
        except Exception as error:
            self.error = error


class EventFileWriter:
    """Writes scalars and histograms into a file that TensorBoard reads. Made by process 0 alone.

    It is a thin layer over the `tensorboard` package's own records, and not over `tensorboardX`, whose queue waits for
    ever on a full disk, at the exit of Python too. Here an event that the disk does not take raises an OSError and
    leaves the file as it was, so that later ones follow.

    Args:
        folder: Of the log; it is made where it is not there.
        purge_step: First step of a run that is resumed: TensorBoard forgets what an earlier file has from there on.

    Raises:
        ImportError: The package `tensorboard` is not there.

    Example:
        >>> import tempfile
        >>> from optloss import tensorboard
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = tensorboard.EventFileWriter(folder)
        ...     writer.add_scalar("loss", 0.5, 7)
        ...     writer.close()

    Unlike TF1's `FileWriter` it has no queue; `AsyncWriter` is one.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int | None = None) -> None:
        """Begins the file."""
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ImportError("EventFileWriter: pip install 'optloss[tensorboard]' would do.") from error
        self._protos, self._summaries, self._record_writer = event_pb2, summary_pb2, RecordWriter
        self._file: io.FileIO | None = None
        if jax.process_index() > 0:
            return
        os.makedirs(folder, exist_ok=True)
        stamp = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_FILES)}"
        self._file = io.FileIO(os.path.join(folder, f"events.out.tfevents.{stamp}"), "wb")
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=purge_step, session_log=start)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Writes a number, NaN and infinity too."""
        self._add_value(step, tag=tag, simple_value=value)

    def add_histogram_raw(
        self,
        tag: str,
        *,
        min: float,  # noqa: A002  # the fields of TensorFlow's histogram
        max: float,  # noqa: A002
        num: float,
        sum: float,  # noqa: A002
        sum_squares: float,
        bucket_limits: list[float],
        bucket_counts: list[float],
        global_step: int,
    ) -> None:
        """Writes a histogram of the given buckets."""
        histogram = self._summaries.HistogramProto(
            min=min,
            max=max,
            num=num,
            sum=sum,
            sum_squares=sum_squares,
            bucket_limit=bucket_limits,
            bucket=bucket_counts,
        )
        self._add_value(global_step, tag=tag, histo=histogram)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _add_value(self, step: int, **fields: Any) -> None:
        value = self._summaries.Summary.Value(**fields)
        self._add(step=step, summary=self._summaries.Summary(value=[value]))

    def _add(self, **fields: Any) -> None:
        """Writes an event, whole or not at all."""
        if self._file is None:
            return
        record, start = io.BytesIO(), self._file.tell()
        self._record_writer(record).write(self._protos.Event(wall_time=time.time(), **fields).SerializeToString())
        rest = memoryview(record.getvalue())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(start)
            self._file.seek(start)
            raise


_FILES = itertools.count()  # so that two writers of one second have two files


class ProgressBar:
    """Shows steps on a bar as they are finished: a sink for an `AsyncWriter`, so that no step waits for the bar.

    Args:
        bar: A `tqdm.tqdm(total=steps)`, or what has its `n`, `update`, `set_postfix` and `close`. It shows the loss,
            the rate and the norm before clipping, of several ops with their names, and what has no "/" in its tag.

    Example:
        >>> from optloss import tensorboard
        >>> from tqdm import tqdm
        >>> bar = tqdm(total=3, disable=True)
        >>> with tensorboard.AsyncWriter(tensorboard.ProgressBar(bar)) as writer:
        ...     for step in range(3):
        ...         writer.write({"OptimizeLoss/loss": 0.5, "accuracy": 0.9}, step)

    TF1's `LoggingTensorHook` printed lines, each of which waited for its step.
    """

    def __init__(self, bar: Any) -> None:
        """Takes the bar."""
        self._bar = bar
        self._values: dict[str, Any] = {}
        self._step, self._next = bar.n - 1, 0.0

    def __call__(self, values: dict[str, Any], step: int) -> None:
        """Takes the values of a step, and shows them where the last were shown a tenth of a second ago."""
        self._values, self._step = values, step
        if time.monotonic() >= self._next:
            self._show()
            self._next = time.monotonic() + 0.1

    def close(self) -> None:
        """Shows the last step and closes the bar."""
        self._show()
        self._bar.close()

    def _show(self) -> None:
        shown = {tag: tag.split("/") for tag in self._values if "/" not in tag or tag.endswith(_SHOWN)}
        several = len({parts[0] for parts in shown.values() if len(parts) > 1}) > 1
        labels = {tag: " ".join({parts[0]: 0, parts[-1]: 0} if several else parts[-1:]) for tag, parts in shown.items()}
        self._bar.set_postfix({label: f"{self._values[tag]:.3g}" for tag, label in labels.items()}, refresh=False)
        self._bar.update(self._step + 1 - self._bar.n)


_SHOWN = ("/loss", "/learning_rate", "/global_norm/gradient_norm")


def write_summaries(writer: _Writer, summaries: _Summaries, step: ArrayLike) -> None:
    """Writes summaries here and now, after one transfer from the device. `AsyncWriter` does not wait for it.

    Scalars are written as they are, NaN and infinity too. Of a histogram's buckets the filled ones are written and, for
    each run of empty ones below one of them, a single empty bucket; a histogram without values is left out.

    Args:
        writer: Anything with `add_scalar(tag, value, step)` and `add_histogram_raw(tag, min=, max=, num=, sum=,
            sum_squares=, bucket_limits=, bucket_counts=, global_step=)`, such as an `EventFileWriter` or a
            `tensorboardX.SummaryWriter`.
        summaries: `output.summaries` of a step, or those of several, stacked as `jax.lax.scan` gives them.
        step: The step to write under, an integer; of several, the first.

    Raises:
        ValueError: The shapes are neither those of one step nor those of one stack.

    Example:
        >>> from optloss import tensorboard
        >>> class PrintingWriter:
        ...     def add_scalar(self, tag, value, step):
        ...         print(step, tag, value)
        ...
        ...     def add_histogram_raw(self, tag, *, global_step, num, bucket_counts, **fields):
        ...         print(global_step, tag, num, bucket_counts)
        >>> gradients = optloss.histogram(jnp.array([1.0, 1.0, 3.0]))
        >>> tensorboard.write_summaries(PrintingWriter(), {"loss": jnp.float32(0.5), "gradients/w": gradients}, step=7)
        7 loss 0.5
        7 gradients/w 3.0 [0.0, 2.0, 0.0, 1.0]

    TF1 left serialized summaries in a collection of the graph, for a `FileWriter` that ran with the step. It kept one
    empty bucket above the last filled one, too, which TensorBoard does not draw.
    """
    for values, at in _rows(summaries, step):
        _write_row(writer, values, at)


def _count_steps(summaries: _Summaries) -> int | None:
    """How many steps are stacked; None where each value is that of one step."""
    found: dict[tuple[int, ...], str] = {}
    for tag, value in summaries.items():
        value = value.num if isinstance(value, Histogram) else value
        if isinstance(value, jax.core.Tracer):
            raise TypeError(f"summaries: {tag!r} is traced; return it from the jitted function and write it outside.")
        found.setdefault(np.shape(value), tag)
    if len(found) > 1 or any(len(shape) > 1 for shape in found):
        shapes = ", ".join(f"{tag!r} of shape {shape}" for shape, tag in found.items())
        raise ValueError(f"summaries: got {shapes}; scalars, or all stacked along one axis of steps, would do.")
    return next((shape[0] for shape in found if shape), None)


def _rows(summaries: _Summaries, step: ArrayLike) -> Iterator[tuple[dict[str, Any], int]]:
    """The values of each step as they came, on the host, after one transfer for all."""
    count = _count_steps(summaries)
    fetched: tuple[dict[str, Any], Any] = jax.device_get((dict(summaries), step))
    values, first = {tag: fetched[0][tag] for tag in summaries}, int(fetched[1])
    if count is None:
        yield values, first
    for i in range(count or 0):
        yield jax.tree.map(lambda stack: stack[i], values), first + i  # noqa: B023  # called here and now


def _write_row(sink: _Sink, values: dict[str, Any], step: int) -> None:
    """Writes the values of one step."""
    numbers = {tag: value if isinstance(value, Histogram) else float(value) for tag, value in values.items()}
    if callable(sink):
        sink(numbers, step)
        return
    for tag, value in numbers.items():
        if not isinstance(value, Histogram):
            sink.add_scalar(tag, value, step)
        elif np.any(value.bucket):
            sink.add_histogram_raw(tag, **_fields(value), global_step=step)


def _fields(histogram: Histogram) -> dict[str, Any]:
    """The fields of a histogram as Python numbers, as protocol buffers want them, with the buckets worth writing."""
    filled = np.asarray(histogram.bucket) > 0
    written = filled | np.append(filled[1:], False)
    return {
        "min": float(histogram.min),
        "max": float(histogram.max),
        "num": float(histogram.num),
        "sum": float(histogram.sum),
        "sum_squares": float(histogram.sum_squares),
        "bucket_limits": np.asarray(histogram.bucket_limit, np.float64)[written].tolist(),
        "bucket_counts": np.asarray(histogram.bucket, np.float64)[written].tolist(),
    }


def _check_count(argument: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}: got {value!r}; an integer >= 1 would do.")
    return value
