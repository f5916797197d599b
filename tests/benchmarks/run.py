"""Prints what a step costs, as a table in Markdown: optloss, an Optax chain and PyTorch against the speed of memory.

    python -m pip install -e ".[benchmarks]" && python tests/benchmarks/run.py

Cells are multiples of the time under "limit", or have their unit. Contenders step in turns, each in a process of its
own, and a cell is a median. "> 180 s": the compilation was stopped there. Run it on a machine that does nothing else.
"""

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path

from cases import plans
from table import COLUMNS, ROWS, Results
from workers import Worker, measure

__all__ = ["main"]

PACKAGES = ("optloss", "jax", "jaxlib", "optax", "torch", "numpy")


def main() -> None:
    """Measures what is asked for and prints each row when it is known."""
    arguments = parse()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compilation is timed
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share an accelerator
    print(machine(), versions(), "", sep="\n")
    print(line("case", *COLUMNS, "to reach"), line("---", *("---:" for _ in COLUMNS), "---"), sep="\n", flush=True)
    measurements = plans(arguments.quick)
    results: dict[str, Results] = {}
    workers = {column: Worker() for column in COLUMNS}
    for name in chosen(arguments):
        row = ROWS[name]
        for measurement in row.measurements:
            plan = measurements[measurement]
            if measurement not in results:  # in a quick run many are equal
                same = next((done for done in results if measurements[done] == plan), None)
                results[measurement] = results[same] if same else measure(workers, plan, arguments.cap)
        cells = row.cells(*(results[measurement] for measurement in row.measurements))
        print(line(row.label, *cells, row.to_reach), flush=True)
    print("", *notes(results), sep="\n")
    for worker in workers.values():
        worker.close()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny arrays and one round: shows that everything runs")
    parser.add_argument("--large", action="store_true", help="the cases of 100M parameters too, which need 8 GB")
    parser.add_argument("--case", action="append", choices=ROWS, metavar="NAME", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--cap", type=float, default=180, help="seconds that a compilation may take (default: 180)")
    return parser.parse_args()


def chosen(arguments: argparse.Namespace) -> list[str]:
    """The rows to print."""
    if arguments.case:
        return [name for name in ROWS if name in arguments.case]
    return [name for name, row in ROWS.items() if arguments.quick or arguments.large or not row.large]


def machine() -> str:
    """The processor and its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def versions() -> str:
    """The versions of Python and of the packages that take part."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def notes(results: dict[str, Results]) -> list[str]:
    """What the contenders said of themselves, once each."""
    said = (f"{column}: {figures.note}" for of in results.values() for column, figures in of.items() if figures.note)
    return list(dict.fromkeys(said))


def line(*cells: str) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
