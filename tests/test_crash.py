"""A run that is killed again and again, at any moment, ends as the one that nobody killed: every step, to the bit.

    python tests/test_crash.py --kills 100                  # says how many kills did no harm
    python tests/test_crash.py --kills 20 --processes 2     # of four devices each

Moments are drawn from a seed; machines differ in what a moment hits, and the outcome must not.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

WORKER = Path(__file__).with_name("crash_worker.py")
STEPS, EVERY = {1: 80, 2: 40}, 5  # of a run of so many processes, and from checkpoint to checkpoint
PATIENCE = 300  # seconds for what takes five, or thirty where much else runs
# A process whose peer died waits 10 s for a heartbeat and 10 s for a shutdown, as crash_worker.py has it.
SURVIVAL = 40

pytestmark = pytest.mark.slow

# ---- the tests -------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    tally = kill_runs(tmp_path, kills=10, kills_of_a_run=5, compile_once=True)
    assert tally.wrong == []


def test_two_processes_that_are_killed_end_as_the_uninterrupted_run(tmp_path: Path) -> None:
    tally = kill_runs(tmp_path, kills=2, kills_of_a_run=2, processes=2, compile_once=True)
    assert tally.wrong == []


# ---- runs that are killed --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tally:
    """How the kills went."""

    wanted: int
    kills: int = 0
    runs: int = 0
    saving: int = 0  # kills that left a checkpoint half written
    starting: int = 0  # kills before the first step
    lost: list[int] = dataclasses.field(default_factory=list)  # steps that were done again
    survivors: list[float] = dataclasses.field(default_factory=list)  # seconds from the death of a peer to their own
    stuck: int = 0  # survivors that had to be killed too
    wrong: list[str] = dataclasses.field(default_factory=list)  # what the kills did to the runs

    def __str__(self) -> str:
        """The tally in a line or two."""
        outcome = f"{len(self.wrong)} things wrong" if self.wrong else "every digest equal"
        where = f"{self.saving} in the midst of a save, {self.starting} before the first step"
        lost = f"lost steps mean {np.mean(self.lost or 0):.1f}, max {max(self.lost, default=0)}"
        lines = [f"{self.kills} of {self.wanted} kills: {outcome}, {where}, {lost}; {self.runs} runs", *self.wrong]
        if self.survivors:
            quick, slow = min(self.survivors), max(self.survivors)
            lines.append(f"survivors: {len(self.survivors)} ended by themselves after {quick:.1f} to {slow:.1f} s")
            lines[-1] += f", {self.stuck} had to be killed"
        return "\n".join(lines)


class Moment(NamedTuple):
    """When to kill what."""

    kind: str  # "start": from the start on; "step": from a step on; "save": from the next save after that step on
    steps: int  # that this start has done by then
    delay: float  # from there on, as a part of the seconds below
    victims: tuple[int, ...]  # processes


DELAYS = {"step": 0.05, "save": 0.15}  # in seconds, at most; a save takes 0.1 where nothing else runs


def draw_moment(draw: np.random.Generator, processes: int) -> Moment:
    """One, all but "start" within a quarter of a run."""
    kind = draw.choice(["start", "step", "step", "save", "save", "save"])
    victims = [(i,) for i in range(processes)] + [tuple(range(processes))] * (processes > 1)
    return Moment(
        str(kind), int(draw.integers(STEPS[processes] // 4)) + 1, draw.random(), victims[draw.integers(len(victims))]
    )


class Run:
    """The processes of a run, from start to start."""

    def __init__(self, folder: Path, processes: int, cache: dict[str, str]) -> None:  # noqa: D107
        self.folder, self.processes, self.environment = folder, processes, {**os.environ, **cache}
        self.workers: list[subprocess.Popen[bytes]] = []
        self.left: dict[str, int] = {}  # the checkpoints that the starts before left half written
        self.starts = 0
        self.folder.mkdir()

    def __enter__(self) -> "Run":  # noqa: D105
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves no process behind."""
        self.end()

    def start(self) -> None:
        """Starts every process, again."""
        self.starts, self.left = self.starts + 1, self.half_written()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.workers = []
        for process in range(self.processes):
            command = [sys.executable, "-W", "error", str(WORKER), str(self.folder), str(self.log(process))]
            command += [str(STEPS[self.processes]), str(EVERY)]
            if self.processes > 1:
                command += [port, str(self.processes), str(process), "4"]
            with open(self.errors(process), "wb") as errors:
                self.workers.append(
                    subprocess.Popen(command, env=self.environment, stdout=errors, stderr=subprocess.STDOUT)
                )

    def log(self, process: int) -> Path:
        """What a process of this start has done."""
        return self.folder / f"log_{self.starts}_{process}"

    def errors(self, process: int) -> Path:
        """What it printed."""
        return self.folder / f"errors_{self.starts}_{process}"

    def lines(self, process: int = 0) -> list[list[str]]:
        """Step and digest, of this start."""
        path = self.log(process)
        return [line.split() for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def half_written(self) -> dict[str, int]:
        """The checkpoints that are not there yet, and when something came to them."""
        found = {}
        for path in self.folder.glob("checkpoints/*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(FileNotFoundError):  # it is there by now, and has another name
                found[path.name] = path.stat().st_mtime_ns
        return found

    def saving(self) -> set[str]:
        """Those that this start is writing: Orbax leaves what a kill left until that step is saved again."""
        return {name for name, when in self.half_written().items() if self.left.get(name) != when}

    def has_ended(self) -> bool:
        """Whether no process is left."""
        return all(worker.poll() is not None for worker in self.workers)

    def is_over(self) -> bool:
        """Whether no process is left, or one failed, which the others may not know yet."""
        return self.has_ended() or any(worker.poll() for worker in self.workers)

    def reach(self, moment: Moment, start_seconds: float) -> None:
        """Waits for the moment, or for the end of the run where that comes first."""
        if moment.kind != "start":
            wait_until(lambda: len(self.lines()) >= moment.steps or self.is_over())
        if moment.kind == "save":
            before = self.saving()
            wait_until(lambda: self.saving() - before or self.is_over())
        end = time.monotonic() + moment.delay * DELAYS.get(moment.kind, start_seconds)
        wait_until(lambda: time.monotonic() >= end or self.is_over())

    def kill(self, victims: tuple[int, ...], tally: Tally) -> bool:
        """Whether there was something left to kill; the others may end by themselves, and none is left then."""
        if self.is_over():
            return False
        workers = [self.workers[victim] for victim in victims]
        for worker in workers:
            worker.kill()
        killed = [worker.wait() == -signal.SIGKILL for worker in workers]
        begin = time.monotonic()
        if not wait_until(self.has_ended, SURVIVAL, fails=False):
            tally.stuck += 1
            self.end()
        elif len(victims) < self.processes and any(killed):
            tally.survivors.append(time.monotonic() - begin)
        return any(killed)

    def end(self) -> None:
        """Kills what is left."""
        for worker in self.workers:
            worker.kill()
            worker.wait()

    def said(self) -> str:
        """The last of what the processes of this start wrote."""
        return "\n".join(self.errors(process).read_text()[-3000:] for process in range(self.processes))


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE, fails: bool = True) -> bool:
    """Polls; whether the condition came to hold in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            assert not fails, f"nothing came for {seconds} s"
            return False
        time.sleep(0.005)
    return True


class Expected(NamedTuple):
    """The run that nobody killed."""

    digests: dict[str, str]  # of each step, and "end"
    arrays: dict[str, bytes]  # of its last state, by their names
    start_seconds: float  # to its first step


def run_uninterrupted(run: Run) -> Expected:
    begin = time.monotonic()
    run.start()
    wait_until(lambda: run.lines() or run.has_ended())
    start_seconds = time.monotonic() - begin
    wait_until(run.has_ended)
    assert [worker.returncode for worker in run.workers] == [0] * run.processes, run.said()
    digests = dict(run.lines())
    assert list(digests) == [*map(str, range(STEPS[run.processes])), "end"]
    assert len(set(digests.values())) == len(digests)  # they tell the steps apart
    assert all(run.lines(process) == run.lines() for process in range(run.processes))
    return Expected(digests, read_end(run), start_seconds)


def read_end(run: Run) -> dict[str, bytes]:
    with np.load(run.folder / "end.npz") as file:
        return {name: file[name].tobytes() for name in file.files}


def kill_run(run: Run, expected: Expected, kills: int, draw: np.random.Generator, tally: Tally) -> None:
    """Starts a run until it ends by itself, and kills it so often before."""
    done, wanted, ended = 0, tally.kills + kills, False  # the steps done, of which a kill may undo some
    while not ended and not tally.wrong:
        run.start()
        killed = False
        if tally.kills < wanted:
            moment = draw_moment(draw, run.processes)
            run.reach(moment, expected.start_seconds)
            killed = run.kill(moment.victims, tally)
        if killed:
            tally.kills += 1
            tally.saving += bool(run.saving())
            tally.starting += not run.lines()
        else:
            wait_until(run.has_ended)
            ended = True
        done = check_start(run, expected, done, ended, tally)
    tally.runs += 1
    if not tally.wrong:
        found = read_end(run)
        names = {*found, *expected.arrays}
        tally.wrong += [f"{run.folder.name}: {n}" for n in names if found.get(n) != expected.arrays.get(n)]


def check_start(run: Run, expected: Expected, done: int, ended: bool, tally: Tally) -> int:
    """Compares what a start did to the run that nobody killed; how many steps are done now."""
    where = f"{run.folder.name}, start {run.starts}"
    if ended and any(worker.returncode for worker in run.workers):
        tally.wrong.append(f"{where} failed:\n{run.said()}")
    for process in range(run.processes):
        differing = [step for step, digest in run.lines(process) if expected.digests[step] != digest]
        if differing:
            tally.wrong.append(
                f"{where}, process {process}: {len(differing)} digests differ, from step {differing[0]} on"
            )
    steps = [int(step) for step, _ in run.lines() if step != "end"]
    if not steps:
        return done
    tally.lost += [done - steps[0]] * (run.starts > 1)
    # A save begins when the one before has ended: no more than one is ever on its way.
    if not 0 <= done - steps[0] <= 2 * EVERY:
        tally.wrong.append(f"{where}: {done} steps were done, and it went on from {steps[0]}")
    return steps[-1] + 1


def kill_runs(
    folder: Path, kills: int, kills_of_a_run: int, processes: int = 1, seed: int = 0, compile_once: bool = False
) -> Tally:
    """Kills runs until there were so many kills, and compares all they did to the run that nobody killed.

    To compile once makes starts faster. The first run alone writes the programs down: a file of JAX's that a kill cuts
    off stays so, and every later start warns of it.
    """
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs")} if compile_once else {}
    write, read = ({**cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": limit} for limit in ("0", "1e9"))
    with Run(folder / "uninterrupted", processes, write) as run:
        expected = run_uninterrupted(run)
    tally = Tally(kills)
    while tally.kills < kills and not tally.wrong:
        before, draw = tally.kills, np.random.default_rng((seed, tally.runs))
        with Run(folder / f"run_{tally.runs}", processes, read) as run:
            kill_run(run, expected, min(kills_of_a_run, kills - before), draw, tally)
        print(tally, flush=True)
        assert tally.kills > before or tally.wrong, "a run was over before it could be killed"
    return tally


def main() -> int:
    """Kills as often as asked, and says how it goes, run for run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crash_"))
    tally = kill_runs(folder, given.kills, 10, given.processes, given.seed)
    if tally.wrong:
        print(f"what the processes wrote is in {folder}")
    else:
        shutil.rmtree(folder)
    return int(bool(tally.wrong))


if __name__ == "__main__":
    sys.exit(main())
