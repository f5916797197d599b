"""A pytest plugin: the names that every docstring's example may use, and eight devices for every test."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optloss

# So that sharded tests run anywhere. It must come before the first array.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, optloss=optloss)
