"""What all tests share: the golden files."""

import json
from pathlib import Path
from typing import Any

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
