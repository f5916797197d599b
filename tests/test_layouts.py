"""The same numbers everywhere: bits of the state, collectives and memory, by layout."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from layouts import train_by_pmap, train_in_shard_map, train_on_mesh

import optloss

OPTIMIZERS = list(optloss.OPTIMIZER_CLS_NAMES)
CLIPS: dict[str, Callable[[], Any]] = {
    "float": lambda: 0.5,
    "adaptive": lambda: optloss.adaptive_clipping_fn(decay=0.5, std_factor=0.5, report_summary=True),
}


def settings_of(optimizer: str, clip: str) -> dict[str, Any]:
    return {
        "learning_rate": 0.1,
        "optimizer": optimizer,
        "gradient_noise_scale": 0.1,
        "gradient_multipliers": {"deep/*": 0.5},
        "clip_gradients": CLIPS[clip](),
        "reproducible": True,
    }


@functools.cache
def on_one_device(optimizer: str, clip: str) -> list[bytes]:
    return bits(train_on_mesh("replicated", 1, AxisType.Auto, settings_of(optimizer, clip)))


def bits(state: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def table(kinds: list[str], axis_types: list[AxisType]) -> list[Any]:
    """Rows of (kind, devices, axis type, optimizer, clip): all on eight devices, half of the optimizers on fewer.

    A few are quick; the rest is slow.
    """
    rows = []
    for devices, kind, axis_type in itertools.product((1, 2, 4, 8), kinds, axis_types):
        for i, (optimizer, clip) in enumerate(itertools.product(OPTIMIZERS, CLIPS)):
            if (devices == 1 and axis_type != axis_types[0]) or (devices < 8 and (i + devices.bit_length()) % 4):
                continue
            is_quick = devices == 8 and (optimizer, clip) == ("Adam", "float") and axis_type == axis_types[0]
            name = f"{kind}-{devices}-{axis_type.name}-{optimizer}-{clip}"
            rows.append(
                pytest.param(
                    kind, devices, axis_type, optimizer, clip, id=name, marks=() if is_quick else pytest.mark.slow
                )
            )
    return rows


COLUMNS = ("kind", "devices", "axis_type", "optimizer", "clip")


@pytest.mark.parametrize(
    COLUMNS, table(["replicated", "data", "rows", "columns", "grid"], [AxisType.Auto, AxisType.Explicit])
)
def test_jit_has_the_bits_of_one_device(
    kind: str, devices: int, axis_type: AxisType, optimizer: str, clip: str
) -> None:
    state = train_on_mesh(kind, devices, axis_type, settings_of(optimizer, clip))
    assert bits(state) == on_one_device(optimizer, clip)


@pytest.mark.parametrize(COLUMNS, table(["data", "rows", "columns", "grid"], [AxisType.Auto, AxisType.Explicit]))
def test_shard_map_has_the_bits_of_one_device(
    kind: str, devices: int, axis_type: AxisType, optimizer: str, clip: str
) -> None:
    state = train_in_shard_map(kind, devices, axis_type, settings_of(optimizer, clip))
    assert bits(state) == on_one_device(optimizer, clip)


@pytest.mark.parametrize(COLUMNS, table(["data"], [AxisType.Auto]))
def test_each_replica_of_pmap_has_the_bits_of_one_device(
    kind: str, devices: int, axis_type: AxisType, optimizer: str, clip: str
) -> None:
    replicas = train_by_pmap(devices, settings_of(optimizer, clip))
    for device in range(devices):
        one = jax.tree.map(lambda leaf, device=device: leaf[device], replicas)
        assert bits(one) == on_one_device(optimizer, clip)
