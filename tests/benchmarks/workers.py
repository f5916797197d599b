"""Processes that hold the contenders: steps of several interleaved, and a cap on what takes long to compile."""

import gc
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

__all__ = ["Contender", "Figures", "Plan", "Worker", "measure"]

WARM_UPS = 2
PAUSE = 0.005  # seconds between steps: idle threads of a library spin for a while before they sleep


class Contender(NamedTuple):
    """What is timed, as its process holds it."""

    step: Callable[[], object]  # returns when its results are there
    repeats: float = 1.0  # what the seconds of a step are divided by
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    note: str = ""  # what the reader of the table should know


class Figures(NamedTuple):
    """What is known of a contender when a measurement ends."""

    seconds: float | None = None  # median; None where no step was asked for
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    note: str = ""
    reason: str = ""  # why there are no figures


class Plan(NamedTuple):
    """A measurement: who takes part, by column, and for how many rounds."""

    contenders: Mapping[str, tuple[Callable[..., Contender], tuple[Any, ...]]]
    rounds: int


class Worker:
    """A process for one column of the table; it holds one contender at a time."""

    def __init__(self) -> None:
        """Starts the process."""
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks without the threads
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()

    def ask(self, *request: Any, cap: float | None = None) -> Figures:
        """The answer to a request, within `cap` seconds."""
        try:
            self._connection.send(request)
            if self._connection.poll(cap):
                answer: Figures = self._connection.recv()
                return answer
            reason = f"> {cap:g} s"
        except (BrokenPipeError, ConnectionResetError, EOFError):
            reason = "killed"  # out of memory, as a rule
        self.close()
        return Figures(reason=reason)

    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.is_alive()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()


def measure(workers: dict[str, Worker], plan: Plan, cap: float) -> dict[str, Figures]:
    """The figures of each column; the contenders step in turns."""
    figures = {}
    for column, (build, arguments) in plan.contenders.items():
        if column not in workers or not workers[column].is_alive():
            workers[column] = Worker()
        workers[column].ask("clear")  # it answers when its imports are done, which the cap is not for
        figures[column] = workers[column].ask("build", build, arguments, cap=cap)
    seconds: dict[str, list[float]] = {column: [] for column, built in figures.items() if not built.reason}
    for _ in range(WARM_UPS + plan.rounds if plan.rounds else 0):
        for column in list(seconds):
            time.sleep(PAUSE)
            stepped = workers[column].ask("step")
            if stepped.seconds is None:
                figures[column] = stepped
                del seconds[column]
            else:
                seconds[column].append(stepped.seconds)
    for column, taken in seconds.items():
        if taken:
            figures[column] = figures[column]._replace(seconds=statistics.median(taken[WARM_UPS:]))
        workers[column].ask("clear")
    return figures


def _serve(connection: Connection) -> None:
    """Answers "build", "step" and "clear" until the process is killed."""
    contender: Contender | None = None
    while True:
        try:
            request, *arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        answer = Figures()
        try:
            if request == "step" and contender is not None:
                answer = Figures(_time(contender))
            else:
                contender = None
                gc.collect()
            if request == "build":
                build, parameters = arguments
                contender = build(*parameters)
                answer = Figures(None, contender.compile_seconds, contender.temporary_bytes, contender.note)
        except Exception as error:  # the other columns have their figures nevertheless
            is_missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
            answer = Figures(reason="not installed" if is_missing else "failed")
            if not is_missing:
                traceback.print_exc()
        connection.send(answer)


def _time(contender: Contender) -> float:
    start = time.perf_counter()
    contender.step()
    return (time.perf_counter() - start) / contender.repeats
