"""Several processes, each with its own devices: the bits of one, and what `init` says where they disagree."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("process_worker.py")

pytestmark = pytest.mark.slow


def run(case: str, processes: int, devices: int) -> list[dict[str, Any]]:
    """What each process printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(WORKER), port, str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parent)}
    results = []
    with contextlib.ExitStack() as stack:
        started = []
        for process in range(processes):
            arguments = [*command, str(process), str(devices), case]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(stack.enter_context(subprocess.Popen(arguments, env=environment, **pipes)))
            stack.callback(started[-1].kill)
        for process in started:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-3000:]
            (line,) = (line for line in out.splitlines() if line.startswith("RESULT "))
            results.append(json.loads(line.removeprefix("RESULT ")))
    return results


@pytest.mark.parametrize("clip", ["float", "adaptive"])
@pytest.mark.parametrize("kind", ["data", "rows"])
def test_two_processes_of_four_devices_have_the_bits_of_one_of_eight(kind: str, clip: str) -> None:
    """After 20 steps with noise, multipliers and clip: parameters, slots, clip statistics and counters."""
    case = f"train:{kind}:Adam:{clip}"
    (one,) = run(case, 1, 8)
    first, second = run(case, 2, 4)
    assert len(one) > 15
    assert first == second == one


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rate", "learning_rate: process 0 has 0.1; process 1 has 0.2"),
        ("clip", "clip_gradients: process 0 has 1; process 1 has 2"),
        ("optimizer", "optimizer: process 0 has 'Adam'; process 1 has 'SGD'"),
        ("seed", "key of init: process 0 has 0; process 1 has 7"),
        ("parameters", "params, values: process 0 has w "),
        (
            "structure",
            "params, names and types: process 0 has b float32[2]; w float32[2]; process 1 has b float32[2]; c",
        ),
        ("function", "learning_rate_decay_fn: process 0 has disagree.<locals>.<lambda>({'factor': 0.9}, "),
        ("partial", "learning_rate_decay_fn: process 0 has partial(halving("),
        ("hidden", "what functions among the settings do: process 0 has "),
    ],
)
def test_processes_that_disagree_are_told_how(what: str, message: str) -> None:
    first, second = run(f"disagree:{what}", 2, 1)
    assert first == second
    lines = first["error"].split("\n  ")
    assert lines[0] == "init: the processes do not agree, and would drift apart:"
    assert lines[1].startswith(message)
    assert len(first["error"]) < 1000


@pytest.mark.parametrize("what", ["nothing", "partial of equals", "equal objects"])
def test_processes_that_agree_train(what: str) -> None:
    assert run(f"disagree:{what}", 2, 1) == [{"error": None}, {"error": None}]
