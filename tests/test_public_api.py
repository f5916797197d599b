"""The public surface: names, import rows, what an import brings in, and that nothing runs code from settings."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import optloss

PACKAGE = Path(optloss.__file__).parent

# A module imports only from rows above its own; `_numerics` and `_names` may use `_check`, and so on down.
ROWS = [
    ["_check", "_update"],
    ["_axes"],
    ["_names", "_numerics", "_trees"],
    ["_rule", "_histogram", "_processes", "_fingerprint"],
    ["_noise", "_multipliers", "_clipping", "_decay", "_learning_rate", "_optimizers", "_ftrl", "_summaries"],
    ["_decay_cosine", "_optimizer_forms", "_checksums"],
    ["_pipeline"],
    ["_agreement", "_explain", "_restore"],
    ["_transformation", "_train_state"],
    ["_optimize_loss"],
    ["__init__", "pictures", "tensorboard"],
]


def imports_of(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names


def test_every_module_stands_in_a_row() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {module for row in ROWS for module in row}


def test_a_module_imports_from_rows_above_its_own_alone() -> None:
    for i, row in enumerate(ROWS):
        above = {f"optloss.{module}" for earlier in ROWS[:i] for module in earlier}
        for module in row:
            assert {name for name in imports_of(module) if name.startswith("optloss")} <= above, module


def test_the_package_imports_jax_numpy_optax_and_the_standard_library_alone() -> None:
    allowed = {"jax", "numpy", "optax", "optloss", *sys.stdlib_module_names}
    extras = {"pictures": {"matplotlib"}, "tensorboard": {"tensorboard"}}  # what nobody else imports
    for path in PACKAGE.glob("*.py"):
        assert {name.split(".")[0] for name in imports_of(path.stem)} <= allowed | extras.get(path.stem, set()), path


def test_importing_optloss_imports_no_optional_package() -> None:
    program = """
import sys, jax, numpy, optax
before = set(sys.modules)
import optloss, optloss.tensorboard
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new <= {"optloss", *sys.stdlib_module_names} | {name.split(".")[0] for name in before}, new
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_all_names_what_the_package_shows() -> None:
    shown = {name for name, value in vars(optloss).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert shown == set(optloss.__all__)
    assert optloss.__all__ == sorted(
        optloss.__all__, key=lambda name: (name != name.upper(), name == name.lower(), name)
    )


def test_every_public_name_is_documented_here_and_in_the_readme() -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    for name in optloss.__all__:
        if not name.startswith("OPTIMIZER"):
            assert inspect.getdoc(getattr(optloss, name)), name
        assert f"`{name}`" in readme or f"`optloss.{name}" in readme or f"optloss.{name}" in readme, name


def test_every_public_function_has_an_example() -> None:
    for name in optloss.__all__:
        value = getattr(optloss, name)
        if inspect.isfunction(value):
            assert ">>>" in (value.__doc__ or ""), name


def test_the_original_names_are_in_the_tables() -> None:
    assert list(optloss.OPTIMIZER_CLS_NAMES) == ["Adagrad", "Adam", "Ftrl", "Momentum", "RMSProp", "SGD"]
    original = {"learning_rate", "loss", "gradients", "gradient_norm", "global_gradient_norm"}
    assert original < set(optloss.OPTIMIZER_SUMMARIES)


def test_the_signature_is_the_original_s_and_then_what_only_jax_needs() -> None:
    parameters = inspect.signature(optloss.optimize_loss).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [
        "loss",
        "global_step",
        "learning_rate",
        "optimizer",
        "gradient_noise_scale",
        "gradient_multipliers",
        "clip_gradients",
        "learning_rate_decay_fn",
        "update_ops",
        "variables",
        "name",
        "summaries",
        "colocate_gradients_with_ops",
        "increment_global_step",
    ]
    without_loss = [p.name for p in inspect.signature(optloss.transformation).parameters.values()]
    assert without_loss[: len(positional) - 1] == positional[1:]


def test_nothing_runs_code_from_a_setting() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "pickle", "marshal", "importlib", "subprocess", "re"}
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not forbidden & (names | imports_of(path.stem)), path


def test_files_and_functions_are_short() -> None:
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"
