"""The matrix of faults: what can go wrong, what optloss does then, and the tests that show it.

    python tests/fault_matrix.py            # runs every test of the matrix and prints a row with its outcome for each
    python tests/fault_matrix.py --list     # prints the rows without running anything

A row that concerns something else than this library has the reason in the place of its tests.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent


class Row(NamedTuple):
    """One fault."""

    number: str  # A1 to K8 of the matrix, 1 to 20 of the findings, with a letter where a row is told apart
    fault: str  # what came, in a few words
    outcome: str  # what optloss does then
    tests: tuple[str, ...] = ()  # "test_file.py::test_name" or, of one case alone, "test_file.py::test_name[case]"
    why_not: str = ""  # the reason for a row without tests


def rows() -> list[Row]:
    """All rows, in the order of their numbers."""
    from fault_rows_running import RUNNING
    from fault_rows_settings import SETTINGS

    return [*SETTINGS, *RUNNING]


class Outcomes:
    """A pytest plugin: the outcome of every test that ran."""

    def __init__(self) -> None:  # noqa: D107
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:  # noqa: D102
        name = report.nodeid.removeprefix("tests/")
        if report.when == "call" or report.outcome != "passed":
            self.of[name] = report.outcome if self.of.get(name, "passed") == "passed" else self.of[name]

    def of_tests(self, tests: Iterable[str]) -> str:
        """How many tests of a row passed, where all did; else which did not."""
        found = {name: outcome for name, outcome in self.of.items() if any(_is_case(name, test) for test in tests)}
        missing = [test for test in tests if not any(_is_case(name, test) for name in found)]
        bad = [f"{name}: {outcome}" for name, outcome in found.items() if outcome != "passed"]
        return "; ".join([*bad, *(f"{test}: not found" for test in missing)]) or f"passed ({len(found)})"


def _is_case(name: str, test: str) -> bool:
    return name == test or name.startswith(f"{test}[")


def main() -> int:
    """Prints the table; 1 where a row did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="run nothing")
    arguments, outcomes, table = parser.parse_args(), Outcomes(), rows()
    if not arguments.list:
        wanted = sorted({f"{TESTS}/{test}" for row in table for test in row.tests})
        pytest.main(["-q", "--no-header", "-m", "slow or not slow", *wanted], plugins=[outcomes])
    bad = 0
    for row in table:
        result = f"not ours: {row.why_not}" if row.why_not else f"{len(row.tests)} tests"
        if row.tests and not arguments.list:
            result = outcomes.of_tests(row.tests)
            bad += not result.startswith("passed")
        print(f"{row.number:4} | {row.fault} | {row.outcome} | {result}")
    ours = sum(not row.why_not for row in table)
    print(
        f"{len(table)} rows: {ours} ours, {len(table) - ours} not; {'not run' if arguments.list else f'{bad} failed'}"
    )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
