"""The name of each parameter and what `variables` selects."""

import dataclasses
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optloss


class Layer(NamedTuple):
    """A tree whose parts have names."""

    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """Another."""

    inner: Any


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"b": {"c": 1.0}, "a": 1.0}, ["a", "b/c"]),
        ([1.0, (1.0, {"x": 1.0})], ["0", "1/0", "1/1/x"]),
        (Layer(1.0, {"0": 1.0}), ["kernel", "bias/0"]),
        (Block([1.0]), ["inner/0"]),
        (flax.core.FrozenDict({"a": {"b": 1.0}}), ["a/b"]),
        ({"a": None, "b": 1.0}, ["b"]),
        ({"mlp/~/linear_0": {"w": 1.0}}, ["mlp/~/linear_0/w"]),
        (1.0, ["params"]),
        ({}, []),
    ],
)
def test_a_name_is_the_path_of_a_parameter(tree: Any, names: list[str]) -> None:
    assert optloss.parameter_names(tree) == names


PARAMS = {"a": {"w": jnp.ones(2), "b": jnp.ones(3)}, "c": jnp.ones(4), "n": jnp.int32(1)}


@pytest.mark.parametrize(
    ("variables", "trained"),
    [
        (None, {"a/w", "a/b", "c"}),
        ("c", {"c"}),
        (["a/w", "c"], {"a/w", "c"}),
        (["a/*"], {"a/w", "a/b"}),
        (["**"], {"a/w", "a/b", "c"}),
        (["*", "a/w"], {"a/w", "c"}),
        (lambda name: name.endswith("b"), {"a/b"}),
        ({"a": {"w": True, "b": False}, "c": True, "n": False}, {"a/w", "c"}),
        ({"a": True, "c": False, "n": False}, {"a/w", "a/b"}),
        ({"a": np.bool_(True), "c": False, "n": True}, {"a/w", "a/b"}),
    ],
)
def test_variables_are_what_is_trained(variables: Any, trained: set[str]) -> None:
    def loss(params: Any) -> jax.Array:
        return sum(jnp.sum(leaf) for leaf in (params["a"]["w"], params["a"]["b"], params["c"]))

    train = optloss.optimize_loss(loss, 0, 1.0, "SGD", variables=variables)
    before = train.init(PARAMS)
    state, _ = train.update(train.init(PARAMS))
    values = zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True)
    moved = [bool(np.any(np.asarray(old) != np.asarray(new))) for old, new in values]
    names = optloss.parameter_names(PARAMS)
    assert {name for name, did in zip(names, moved, strict=True) if did} == trained


def test_variables_as_a_list_of_booleans_is_a_tree_where_parameters_are_a_list() -> None:
    train = optloss.optimize_loss(lambda p: p[0] + p[1], 0, 1.0, "SGD", variables=[True, False])
    state, _ = train.update(train.init([1.0, 1.0]))
    assert [float(leaf) for leaf in state.params] == [0.0, 1.0]
