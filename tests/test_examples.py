"""The examples run as their docstrings say, and leave what these promise."""

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Each pays an import and a compilation in a process of its own.
pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
DIGITS = EXAMPLES / "digits.py"
STEPS = 42  # of an epoch: three quarters of 1,797 images are 1,347, of which 42 whole batches of 32 are taken
LAST_LINE = r"test accuracy (\d+\.\d) % after (\d+) steps in (\d+\.\d) s \(log and picture: (.+)\)"


def run_digits(out: Path, *options: str) -> re.Match[str]:
    """The last line that examples/digits.py prints."""
    command = [sys.executable, str(DIGITS), "--out", str(out), *options]
    done = subprocess.run(command, cwd=DIGITS.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = re.fullmatch(LAST_LINE, done.stdout.strip().splitlines()[-1])
    assert line, done.stdout
    return line


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, re.Match[str]]:
    """The folder and the last line of a run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    return out, run_digits(out, "--epochs", "2")


def test_digits_learns_in_two_epochs(short_run: tuple[Path, re.Match[str]]) -> None:
    """By chance it would read a tenth of the digits; twelve seeds read from 95 to 98 % of them."""
    out, line = short_run
    accuracy, steps, _, folder = line.groups()
    assert float(accuracy) >= 90
    assert int(steps) == 2 * STEPS
    assert folder == str(out)


def test_digits_leaves_a_picture(short_run: tuple[Path, re.Match[str]]) -> None:
    """A PNG begins with its signature, and its width and height are at byte 16."""
    png = (short_run[0] / "digits.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert 1000 <= width <= 3000
    assert 700 <= height <= 2000
    assert len(png) > 50_000  # an empty picture of this size has less than a tenth of that


def test_digits_logs_every_summary_of_every_step(short_run: tuple[Path, re.Match[str]]) -> None:
    """The loss falls, the rate follows half a cosine from 0.004, and no norm grows by clipping."""
    events = EventAccumulator(str(short_run[0]), size_guidance={"scalars": 0})
    events.Reload()
    norms = {f"global_norm/{norm}" for norm in ("gradient_norm", "clipped_gradient_norm", "adaptive_max_gradient_norm")}
    layers = {f"gradient_norm/{layer}/{part}" for layer in ("conv_1", "conv_2", "dense") for part in ("bias", "kernel")}
    wanted = {f"OptimizeLoss/{tag}" for tag in {"loss", "learning_rate"} | norms | layers} | {"accuracy"}
    assert set(events.Tags()["scalars"]) == wanted
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in wanted}
    assert all(found == list(range(2 * STEPS)) for found in steps.values())
    values = {tag: [event.value for event in events.Scalars(f"OptimizeLoss/{tag}")] for tag in ("loss", *norms)}
    assert sum(values["loss"][-STEPS:]) < sum(values["loss"][:STEPS]) / 2
    pairs = zip(values["global_norm/clipped_gradient_norm"], values["global_norm/gradient_norm"], strict=True)
    assert all(0 < clipped <= norm for clipped, norm in pairs)
    rates = [event.value for event in events.Scalars("OptimizeLoss/learning_rate")]
    assert rates[0] == pytest.approx(0.004, rel=1e-6)
    assert rates[STEPS] == pytest.approx(0.002, rel=1e-6)  # halfway, where the cosine is 0


@pytest.mark.slow
def test_digits_reads_at_least_98_of_100_test_digits_right(tmp_path: Path) -> None:
    """As the docstring has it run, but for the folder; twelve seeds read from 98.9 to 99.8 %."""
    assert float(run_digits(tmp_path / "digits")[1]) >= 98


def output_of(example: str, *options: str) -> str:
    """What an example prints."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / example), *options]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_pmap_leaves_eight_equal_replicas_that_have_learnt() -> None:
    last = output_of("pmap.py", "--steps", "60").splitlines()[-1]
    found = re.fullmatch(r"test accuracy (\d+\.\d) % after 60 steps \(replicas: 8, equal to the bit\)", last)
    assert found, last
    assert float(found[1]) >= 80


def test_fsdp_learns_with_an_eighth_of_the_state_on_each_device() -> None:
    bits, held = output_of("fsdp.py", "--steps", "40", "--width", "32", "--layers", "1").splitlines()[-2:]
    found = re.fullmatch(r"bits per byte of unseen text: (\d+\.\d\d) before, (\d+\.\d\d) after 40 steps", bits)
    assert found, bits
    assert float(found[2]) < 6 < 8 < float(found[1])  # 8 is what a guess among all bytes takes
    found = re.fullmatch(r"devices: 8, each with ([\d,]+) of ([\d,]+) kB of parameters and slots", held)
    assert found, held
    part, whole = (int(number.replace(",", "")) for number in found.groups())
    assert 8 * part <= 1.02 * whole


def test_processes_end_with_the_same_parameters() -> None:
    """Lines of the two, and what libraries in them print, come in any order."""
    output = output_of("processes.py", "--steps", "40")
    end = r"(\d): 8 devices, 1/8 of the state on each; test accuracy (\d+\.\d) % after 40 steps; digest (\w+)"
    first, second = sorted(re.findall(f"process {end}", output))
    assert (first[0], second[0]) == ("0", "1")
    assert first[1:] == second[1:]
    assert float(first[1]) > 75
