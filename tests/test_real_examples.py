"""The examples on real tasks run without a warning at a reduced size, and print and leave what they promise."""

import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Each pays imports and a compilation in a process of its own.
pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def command_of(example: str, *options: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / example), *options]


def lines_of(example: str, *options: str) -> list[str]:
    """What an example prints."""
    command = command_of(example, *options)
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def matched(pattern: str, line: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, line)
    assert found, line
    return found.groups()


def size_of(png: Path) -> tuple[int, int]:
    """A PNG begins with its signature, and its width and height are at byte 16."""
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


# ---- the transformer -------------------------------------------------------------------------------------------------

SMALL = ("--decay-steps", "40", "--width", "64", "--every", "10")
BITS = r"bits per byte of unseen text: (\d\.\d\d) at step (\d+), (\d\.\d\d) at step (\d+)"
DIGEST = r"parameters: ([\d,]+), digest (\w{8}) \(checkpoints, log and picture: .+\)"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder and the lines of a run of 40 steps."""
    out = tmp_path_factory.mktemp("runs") / "transformer"
    return out, lines_of("transformer.py", *SMALL, "--steps", "40", "--out", str(out))


def digest_of(lines: list[str]) -> str:
    return matched(DIGEST, lines[1])[1]


def test_transformer_learns_and_leaves_a_picture(uninterrupted: tuple[Path, list[str]]) -> None:
    """8 bits are what a guess among all bytes takes; about 4.5 are left after 40 steps."""
    out, lines = uninterrupted
    before, first, after, last = matched(BITS, lines[0])
    assert (first, last) == ("0", "40")
    assert float(after) < 5.5 < 8 < float(before)
    # By hand: 256 bytes and 64 places of 64 numbers, two layers of (4 + 8) * 64 ** 2, 256 odds, and 5 norms.
    assert matched(DIGEST, lines[1])[0] == f"{(256 + 64) * 64 + 2 * 12 * 64**2 + 64 * 256 + 5 * 64:,}"
    assert size_of(out / "run.png") > (500, 300)


def test_transformer_goes_on_to_the_bits_of_an_uninterrupted_run(
    uninterrupted: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """The second run begins where the first ended, and the third has nothing left to do."""
    whole, options = uninterrupted[1], (*SMALL, "--out", str(tmp_path))
    half = lines_of("transformer.py", *options, "--steps", "20")
    rest = lines_of("transformer.py", *options, "--steps", "40")
    assert matched(BITS, half[0])[2:] == matched(BITS, rest[0])[:2]
    assert digest_of(half) != digest_of(rest) == digest_of(whole)
    assert matched(BITS, rest[0])[2:] == matched(BITS, whole[0])[2:]
    assert digest_of(lines_of("transformer.py", *options, "--steps", "40")) == digest_of(whole)


def test_transformer_goes_on_after_a_kill(uninterrupted: tuple[Path, list[str]], tmp_path: Path) -> None:
    """It is killed as soon as the checkpoint of step 20 is there, in the midst of what comes next."""
    options = (*SMALL, "--out", str(tmp_path), "--steps", "40")
    running = subprocess.Popen(command_of("transformer.py", *options), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "20").exists() and time.monotonic() < end:
        time.sleep(0.01)
    running.kill()
    running.wait()
    lines = lines_of("transformer.py", *options)
    assert int(matched(BITS, lines[0])[1]) in (20, 30, 40)
    assert digest_of(lines) == digest_of(uninterrupted[1])


def test_transformer_logs_the_norm_of_every_layer_once_a_step(tmp_path: Path) -> None:
    """Of a run that went on too; the rate rises for a tenth of the decay and falls afterwards."""
    for steps in ("10", "20"):
        lines_of("transformer.py", *SMALL, "--out", str(tmp_path), "--steps", steps)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    layers = ("attend/query/kernel", "attend/key/kernel", "attend/value/kernel", "attend/out/kernel")
    layers += ("in/kernel", "out/kernel")
    assert {f"OptimizeLoss/gradient_norm/layer_{i}_{layer}" for layer in layers for i in range(2)} <= set(tags)
    assert all([event.step for event in events.Scalars(tag)] == list(range(20)) for tag in tags)
    rates = [event.value for event in events.Scalars("OptimizeLoss/learning_rate")]
    assert rates.index(max(rates)) == 3
    assert rates[0] == pytest.approx(max(rates) / 4, rel=0.02)  # but for the cosine


# ---- the others ------------------------------------------------------------------------------------------------------


def test_gan_draws_all_ten_digits(tmp_path: Path) -> None:
    """Three seeds had 86 to 90 % taken for digits."""
    taken, found = lines_of("gan.py", "--steps", "600", "--out", str(tmp_path))
    pattern = r"taken for a digit: (\d+) % of drawn images before, (\d+) % after 600 steps, (\d+) % of real ones"
    before, after, real = (int(share) for share in matched(pattern, taken))
    assert before < 5
    assert 70 < after <= 100
    assert real > 90
    (digits,) = matched(r"digits among those drawn: (\d+) of 10 \(64 samples: .+/samples\.png\)", found)
    assert int(digits) >= 9
    assert size_of(tmp_path / "samples.png") == (640, 640)


def test_finetune_learns_with_a_part_of_the_parameters() -> None:
    """The parts by hand: 4 * 4 * 32 numbers to 64, these to 2, a bias each, and a slot of 4 bytes for each."""
    right, parts = lines_of("finetune.py", "--steps", "200")
    pattern = r"odd or even: (\d+\.\d) % of test images right when fine-tuned on 30, (\d+\.\d) % when trained .+"
    tuned, scratch = (float(share) for share in matched(pattern, right))
    assert tuned > 80
    assert scratch > 60
    convolutions, rest = 9 * 32 + 32 + 9 * 32 * 32 + 32, 4 * 4 * 32 * 64 + 64 + 64 * 2 + 2
    wanted = f"trained: {rest:,} of {convolutions + rest:,} parameters, with {4 * rest:,} bytes of slots; "
    assert parts == wanted + "the others are the same to the bit"


def test_rates_finds_the_best_of_nine(tmp_path: Path) -> None:
    """Too low a rate gets nowhere in so few steps, too high a one neither."""
    _, *table, best = lines_of("rates.py", "--epochs", "4", "--out", str(tmp_path))
    rows = [matched(r" *([\d.e-]+) +(\d+\.\d+) +(\d+\.\d) %", line) for line in table]
    accuracies = {float(rate): float(accuracy) for rate, _, accuracy in rows}
    assert list(accuracies) == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1]
    rate, accuracy = matched(r"best: rate (\S+) with (\d+\.\d) % \(losses: .+\)", best)
    assert accuracies[float(rate)] == float(accuracy) == max(accuracies.values())
    assert 1e-4 < float(rate) < 1
    assert float(accuracy) > 90 > 60 > accuracies[1]
    assert accuracies[1e-4] < 90
    assert size_of(tmp_path / "losses.png") > (500, 300)
