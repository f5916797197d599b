"""The measurements: who takes part in each, at what sizes."""

from typing import TypeAlias

import dispatch
import jax_contenders
import limit
import pieces
import torch_contenders
from workers import Plan

__all__ = ["plans"]

Shapes: TypeAlias = list[tuple[int, ...]]

ROUNDS = 11
CALLS = 1000  # of a function that takes microseconds
SCAN = 100  # steps
BUCKETS = 1551  # of TensorFlow's histograms
VALUES = (10_000, 1000)
MODELS: dict[str, Shapes] = {
    "10M in 10": [(1000, 1000)] * 10,
    "100M in 10": [(10_000, 1000)] * 10,
    "10M in 300": [(33, 1010)] * 300,
    "100M in 300": [(330, 1010)] * 300,
    "3M in 3,000": [(1000,)] * 3000,
}


def plans(quick: bool) -> dict[str, Plan]:
    """Every measurement by name; with `quick`, of tiny arrays and one round."""
    rounds, calls, scan = (1, 3, 2) if quick else (ROUNDS, CALLS, SCAN)
    tiny: Shapes = [(8, 8)] * 2
    models = {name: tiny if quick else shapes for name, shapes in MODELS.items()}
    values, noisy = (8, 8) if quick else VALUES, models["10M in 10"]
    found = {
        f"compile, {name}": steps(models[name], True, False, rounds if quick else 0)
        for name in ("10M in 300", "3M in 3,000")
    }
    for name, shapes in models.items():
        found[f"full, {name}"] = steps(shapes, True, True, rounds)
        found[f"truncated, {name}"] = truncated(shapes, rounds)
        found[f"quiet, {name}"] = steps(shapes, False, True, rounds)
        found[f"plain, {name}"] = steps(shapes, False, False, rounds)
    for name, noisy_step in (("with noise", True), ("without noise", False)):
        found[f"guard, {name}"] = guards(models["10M in 10"], noisy_step, rounds)
    found["transformation"] = transformations(models["10M in 10"], rounds)
    found["call"] = step_calls(calls, rounds)
    found["call, list"] = list_calls(calls, rounds)
    found["scan"] = scans(calls, scan, rounds)
    found["noise"] = noise(noisy, rounds)
    found["histogram, read"] = histograms(values, rounds)
    found["histogram, jax"] = jax_histograms(values, rounds)
    return found


def steps(shapes: Shapes, noise: bool, in_scan: bool, rounds: int) -> Plan:
    """Full steps, or, without `noise`, multipliers, norms, clip and Adam; with no rounds, their compilation."""
    return Plan(
        {
            "limit": (limit.limit_step, (shapes,)),
            "optloss": (jax_contenders.optloss_step, (shapes, noise, in_scan)),
            "Optax chain": (jax_contenders.optax_step, (shapes, noise, in_scan)),
            "PyTorch": (torch_contenders.torch_step, (shapes, "normal" if noise else None)),
        },
        rounds,
    )


def guards(shapes: Shapes, noise: bool, rounds: int) -> Plan:
    """Steps that are skipped where something is not finite, against the same that are applied all the same."""
    return Plan(
        {
            "limit": (jax_contenders.optloss_step, (shapes, noise, True, "apply")),
            "optloss": (jax_contenders.optloss_step, (shapes, noise, True, "skip")),
        },
        rounds,
    )


def transformations(shapes: Shapes, rounds: int) -> Plan:
    """Full steps as a transformation, whose updates are written over the gradients and returned."""
    return Plan(
        {
            "limit": (limit.limit_step, (shapes,)),
            "optloss": (jax_contenders.optloss_transformation, (shapes,)),
            "Optax chain": (jax_contenders.optax_transformation, (shapes,)),
        },
        rounds,
    )


def truncated(shapes: Shapes, rounds: int) -> Plan:
    """PyTorch's full step with noise of the distribution that the others have."""
    return Plan(
        {
            "limit": (limit.limit_step, (shapes,)),
            "PyTorch": (torch_contenders.torch_step, (shapes, "truncated")),
        },
        rounds,
    )


def step_calls(calls: int, rounds: int) -> Plan:
    """Calls of a step of four small arrays, against a call that adds 1 to the same state."""
    return Plan(
        {
            "limit": (dispatch.bare_call, (calls,)),
            "optloss": (dispatch.optloss_call, (calls,)),
            "Optax chain": (dispatch.optax_call, (calls,)),
            "PyTorch": (torch_contenders.torch_call, (calls,)),
        },
        rounds,
    )


def list_calls(calls: int, rounds: int) -> Plan:
    """The same, against a call that has the state as a flat list."""
    return Plan(
        {
            "limit": (dispatch.bare_list_call, (calls,)),
            "optloss": (dispatch.optloss_call, (calls,)),
        },
        rounds,
    )


def scans(calls: int, steps: int, rounds: int) -> Plan:
    """Steps of the same in a scan."""
    repeats = max(calls // steps, 1)
    return Plan(
        {
            "limit": (dispatch.bare_call, (calls,)),
            "optloss": (dispatch.optloss_scan, (steps, repeats)),
            "Optax chain": (dispatch.optax_scan, (steps, repeats)),
        },
        rounds,
    )


def noise(shapes: Shapes, rounds: int) -> Plan:
    """Noise alone."""
    return Plan(
        {
            "limit": (pieces.jax_noise, (shapes,)),
            "optloss": (pieces.optloss_noise, (shapes,)),
            "Optax chain": (pieces.optax_noise, (shapes,)),
            "PyTorch": (torch_contenders.torch_noise, (shapes, "normal")),
        },
        rounds,
    )


def histograms(shape: tuple[int, ...], rounds: int) -> Plan:
    """Histograms against one read of the values."""
    return Plan(
        {
            "limit": (pieces.read, (shape,)),
            "optloss": (pieces.optloss_histogram, (shape,)),
            "PyTorch": (torch_contenders.torch_histogram, (shape, BUCKETS)),
        },
        rounds,
    )


def jax_histograms(shape: tuple[int, ...], rounds: int) -> Plan:
    """Histograms against JAX's."""
    return Plan(
        {
            "limit": (pieces.jax_histogram, (shape, BUCKETS)),
            "optloss": (pieces.optloss_histogram, (shape,)),
        },
        rounds,
    )
