"""What all tests share: doctest's names, the dtype and rank rules, and the golden files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optloss

GOLDEN = Path(__file__).parent / "golden"

# Eight devices, so that sharded tests run anywhere. It must come before the first array.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, optloss=optloss)


def read_golden(path: str) -> Any:
    """One golden file, with "nan", "inf" and "-inf" as numbers."""
    return _numbers(json.loads((GOLDEN / path).read_text()))


def _numbers(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_numbers(value) for value in node]
    return float(node) if node in ("nan", "inf", "-inf") else node
