"""Mutation tests of the package: which changes of its source do the tests not see?

    python -m pip install -e ".[mutation]"
    python tests/mutate.py --out runs/mutants _noise _clipping     # stop it at any time; it goes on where it was
    python tests/mutate.py --out runs/mutants --report _noise _clipping

Cosmic Ray has the operators. A mutant runs in a fork of a process that has imported JAX but has not started its
backend, since a Python of its own would take most of the time; its source takes the module's place in memory alone.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import chex
import flax
import jax
import optax
import pytest

ROOT = Path(__file__).parents[1]
IMPORTED = chex, flax, optax  # once, for all forks

# The tests of each module, as an expression, and files: first what is fast and tells most. A run ends at a failure.
RULES = "(formula or safe or guard or _optimizer or schedul or overflow or bounds or through) and not optax_name"
TESTS = {
    "_multipliers": "(multipl or factor or by_name or bad_setting or at_init or another_type) and not contract",
    "_clipping": "(clip or by_name or bounds or explain_warns) and not contract and not norm_is and not norm_of",
    "_noise": "(noise or key or draw or scale or index or bits or by_name or bounds) and (not contract or eight)",
    "_optimizers": f"{RULES} and (not contract or adam or centered)",
    "_rule": f"({RULES} or by_name) and (not contract or adam)",
    "_ftrl": "ftrl and (not contract or through) or traced and not contract",
}
FILES = "mutants", "multipliers clipping noise optimizers bad_input misfits explain optimize_loss axes contract"


class Mutant(NamedTuple):
    """One change of a module. `occurrence` counts the operator's places; line 0 is no change."""

    module: str
    operator: str
    occurrence: int
    line: int

    @property
    def path(self) -> Path:
        """The file that is mutated."""
        return ROOT / "optloss" / f"{self.module}.py"

    @property
    def key(self) -> str:
        """Its name in the results, another one for other source."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:8]
        return f"{self.module}@{digest}:{self.line} {self.operator}#{self.occurrence}"

    def source(self) -> str:
        """The mutated source."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        source = self.path.read_text()
        return mutate_code(source, get_operator(self.operator)(), self.occurrence) if self.line else source


def main() -> None:
    """Runs the mutants that have no result yet, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", choices=TESTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--sample", type=int, help="mutants of each module, drawn with a fixed seed; all by default")
    parser.add_argument("--retry", action="store_true", help="run those that survived once more")
    parser.add_argument("--report", action="store_true", help="print what is known, run nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    for module in options.modules:
        mutants = list(mutants_of(module))
        random.Random(0).shuffle(mutants)
        results = options.out / "results.jsonl"
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        known = {row["key"]: row["outcome"] for row in rows}
        pairs = [(mutant, known.get(mutant.key)) for mutant in mutants[: options.sample]]
        if options.report:
            report(module, pairs)
        else:
            run_all(module, [m for m, o in pairs if o is None or (options.retry and o == "survived")], options.out)


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every mutant in which behaviour can hang; operators that want arguments are left out."""
    from cosmic_ray.ast import ast_nodes, get_ast  # not above: pytest imports this file, in search of doctests
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast(Mutant(module, "", 0, 0).path.read_text())))
    for name in operator_names():
        if not (operator := get_operator(name)).arguments():
            places = [(node, start) for node in nodes for start, _ in operator().mutation_positions(node)]
            for occurrence, (node, start) in enumerate(places):
                if not says_nothing(node):
                    yield Mutant(module, name, occurrence, start[0])


def says_nothing(node: Any) -> bool:
    """Whether a node is in an annotation, an import, a type alias, an assertion or the text of an error."""
    while (parent := node.parent) is not None:
        annotation = {"annassign": 1, "tfpdef": 2}.get(parent.type)
        if (
            (annotation and node is parent.children[annotation])
            or (parent.type == "annassign" and "TypeAlias" in parent.children[1].get_code())
            or (parent.type == "funcdef" and node is parent.annotation)
            or node.type in ("raise_stmt", "import_from", "import_name", "assert_stmt")
            or (node.type == "argument" and node.get_code().strip() == "strict=True")  # an assertion too
        ):
            return True
        node = parent
    return False


def run_all(module: str, mutants: list[Mutant], out: Path) -> None:
    """Runs mutants in turn, after a run without a change, whose time sets the limit."""
    control = run(Mutant(module, "", 0, 0), out, 600)
    if control["outcome"] != "survived":
        raise SystemExit(f"{module}: the tests fail without a mutation: {control}")
    for i, mutant in enumerate(mutants, 1):
        result = run(mutant, out, 30 + 3 * control["seconds"])
        with (out / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{i}/{len(mutants)} {result['outcome']} {result['seconds']} s {mutant.key} {result['by']}", flush=True)


def run(mutant: Mutant, out: Path, limit: float) -> dict[str, Any]:
    """The result of the tests in a fork: killed, survived, or invalid where the mutant is not Python."""
    started, log, status, by = time.monotonic(), out / f"{os.getpid()}.log", None, ""
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(SyntaxError):
        status = wait_for(fork(mutant, compile(mutant.source(), mutant.path, "exec"), out, log), limit)
        failed = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
        by = [*failed, f"status {status}"][0] if status else ""
    outcome = "invalid" if status is None else "killed" if status else "survived"
    return {"key": mutant.key, "outcome": outcome, "by": by[:200], "seconds": round(time.monotonic() - started, 1)}


def fork(mutant: Mutant, code: CodeType, out: Path, log: Path) -> int:
    """Starts the tests of a mutant in a process group of its own."""
    if (pid := os.fork()) != 0:
        return pid
    status = 70
    try:
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        get_code, name = SourceFileLoader.get_code, f"optloss.{mutant.module}"
        SourceFileLoader.get_code = lambda self, full: code if full == name else get_code(self, full)  # type: ignore
        sys.path.insert(0, str(ROOT))
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))  # what no mutation touches is there
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for names in FILES:
            files = [str(mutant.path), *(f"tests/test_{name}.py" for name in names.split())]
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", TESTS[mutant.module], *files]))
            if status:
                break
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait_for(pid: int, limit: float) -> int:
    """The status of a process, which is ended after so many seconds."""
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(pid, signal.SIGKILL))
    signal.alarm(int(limit))
    status = os.waitpid(pid, 0)[1]
    signal.alarm(0)
    return status


def report(module: str, pairs: list[tuple[Mutant, str | None]]) -> None:
    """Prints the score of a module and the mutants that survived."""
    outcomes = [outcome for _, outcome in pairs]
    killed, ran = outcomes.count("killed"), outcomes.count("killed") + outcomes.count("survived")
    print(f"{module}: {ran} mutants, {killed} killed ({killed / max(ran, 1):.1%}), {outcomes.count(None)} not run yet")
    for mutant, outcome in sorted(pairs, key=lambda pair: pair[0].line):
        if outcome == "survived":
            before, after = (text.splitlines() for text in (mutant.path.read_text(), mutant.source()))
            print(f"  {mutant.line}: {before[mutant.line - 1].strip()}\n   -> {after[mutant.line - 1].strip()}")


if __name__ == "__main__":
    main()
