"""The benchmarks run, and their limit does the arithmetic that it stands for. No time is asserted."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import limit
import numpy as np
import pytest
from table import COLUMNS, ROWS

RUN = Path(__file__).with_name("run.py")
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(| ms| us| ns| s| MB|%)")
NO_NUMBER = {"-", "not installed"}


def run(*options: str) -> list[list[str]]:
    """The rows that run.py prints, without the table's head."""
    done = subprocess.run([sys.executable, str(RUN), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow  # it compiles a dozen steps
def test_a_quick_run_prints_a_number_in_every_cell_that_has_one() -> None:
    rows = run("--quick")
    assert [row[0] for row in rows] == [row.label for row in ROWS.values()]
    for label, *cells, to_reach in rows:
        assert len(cells) == len(COLUMNS), label
        assert to_reach, label
        found = [NUMBER.fullmatch(cell) for cell in cells if cell not in NO_NUMBER]
        assert found or "PyTorch" in label, label
        for number in found:
            assert number, f"{label}: {cells}"
            assert math.isfinite(float(number[1])), label
            # Nothing may be temporary, and noise may seem to cost less than nothing where arrays are tiny.
            assert float(number[1]) > 0 or number[2] in (" MB", "%"), label


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_c_kernel_takes_the_step_that_numpy_takes(threads: int) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    by_c, by_numpy = columns(), columns()
    step = limit.c_step(compiler, by_c, threads)
    assert step is not None
    for _ in range(3):
        step()
        limit.numpy_step(by_numpy, block=100)()
    for one, other in zip(by_c, by_numpy, strict=True):
        for mine, expected in zip(one, other, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-8)  # -ffast-math sums in another order


def columns() -> list[list[limit.Array]]:
    """Gradients, both moments and parameters, of sizes that leave parts of vectors."""
    generator = np.random.default_rng(0)
    sizes = [70, 1, 5000, 129]
    gradients = [generator.standard_normal(size, dtype=np.float32) for size in sizes]
    return [gradients, *([np.zeros(size, np.float32) for size in sizes] for _ in range(3))]


@pytest.mark.slow  # it compiles a dozen steps
def test_a_quick_run_of_scale_shows_parts_of_equal_size_on_all_devices() -> None:
    """Argument bytes are four arrays of float32 whatever the devices, and no array is larger than a device's part."""
    done = subprocess.run(
        [sys.executable, str(RUN.with_name("scale.py")), "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    compiled = [row for row in rows if len(row) == 8 and row[1].isdigit()]
    assert {row[1] for row in compiled} == {"1", "8"}
    for row in compiled:
        assert 16 <= float(row[2]) < 17, row
        assert row[6] == "1", row
