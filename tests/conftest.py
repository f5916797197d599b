"""What all tests share: the golden files."""

import json
from pathlib import Path
from typing import Any

import jax

# jax.enable_x64 is a context manager from 0.8 on; before, it was jax.experimental's.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

GOLDEN = Path(__file__).parent / "golden"


def read_golden(path: str) -> Any:
    """One golden file, with "nan", "inf" and "-inf" as numbers."""
    return _numbers(json.loads((GOLDEN / path).read_text()))


def _numbers(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_numbers(value) for value in node]
    return float(node) if node in ("nan", "inf", "-inf") else node
