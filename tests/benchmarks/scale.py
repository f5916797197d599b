"""Prints how a step scales over devices, as tables in Markdown: what each holds and sends, and how long a step takes.

    python tests/benchmarks/scale.py
    python -m pip install libtpu && python tests/benchmarks/scale.py --tpu v5e:2x4 --tpu v5e:16x16

A step is `optloss.transformation` (Adam, noise, clip) on gradients that are given, and `optax.apply_updates`. About so
many parameters as a row says are ten matrices, cut by rows over all devices (FSDP); so are gradients and slots, and all
are donated. Bytes are the compiler's count of a device's, for each parameter of the device's part; the largest array of
the program is a multiple of its part of a matrix.
"""

import argparse
import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from run import line, machine, versions
from workers import PAUSE, WARM_UPS

import optloss

__all__ = ["main"]

MATRICES = 10
ROUNDS = 21
FIGURES = ("argument bytes", "temporary bytes", "GB a device", "collectives (in branches)", "largest array", "compile")
OVERHEAD = "CPU devices share the same cores, so more cannot be faster: in brackets is the overhead, over one device."
COLLECTIVE = re.compile(r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\(")
BRANCHES = re.compile(r"(?:branch_computations={([^}]*)}|(?:true|false)_computation=(%[\w.\-]+))")
# What libtpu asks of a TPU that is there; without one it says at length that it did not find out.
TPU = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_LOG_DIR": "disabled"}


class Step(NamedTuple):
    """A compiled step, and how the arrays lie that it takes."""

    compiled: Any
    transformation: optax.GradientTransformationExtraArgs
    arguments: tuple[Any, Any, Any]  # gradients, state and parameters, of `jax.ShapeDtypeStruct`
    seconds: float  # of tracing and compilation


def main() -> None:
    """Compiles and measures what is asked for."""
    arguments = parse()
    os.environ.update(TPU | dict(os.environ))
    jax.config.update("jax_platforms", "cpu")  # no accelerator is touched
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
    chips = {name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices for name in arguments.tpu}
    print(machine(), versions(), sep="\n")
    if arguments.quick:
        on_cpu(powers=[4], measured=4, counts=[1, 8], rounds=1)
        on_tpu([4], chips)
    else:
        on_cpu(powers=[6, 7, 8, 9], measured=8 if arguments.large else 7, counts=[1, 2, 4, 8], rounds=ROUNDS)
        on_tpu([9, 10, 11] if arguments.large else [9], chips)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny arrays and one round: shows that everything runs")
    parser.add_argument("--large", action="store_true", help="steps of 1e8 too, which need 8 GB; on TPUs 1e10 and 1e11")
    parser.add_argument("--tpu", action="append", default=[], metavar="NAME", help="topology; it need not be there")
    return parser.parse_args()


def on_cpu(powers: Sequence[int], measured: int, counts: Sequence[int], rounds: int) -> None:
    """Prints what is compiled for CPU devices, then the time of a step, up to a power of ten."""
    head("Compiled for CPU devices, nothing run", "parameters", "devices", *FIGURES)
    medians = {}
    for power in powers:
        steps = []
        for count in counts:
            steps.append(compile_step(10**power, jax.devices()[:count]))
            print(line(f"1e{power}", str(count), *figures(steps[-1])), flush=True)
        if power <= measured:
            medians[power] = step_seconds(steps, rounds)
    head("Time of a step on CPU devices", "parameters", *(f"on {count}" for count in counts))
    for power, seconds in medians.items():
        print(line(f"1e{power}", *(f"{1e3 * own:.3g} ms ({own / seconds[0]:.2f})" for own in seconds)))
    print(f"\n{OVERHEAD}", flush=True)


def on_tpu(powers: Sequence[int], chips: Mapping[str, Sequence[jax.Device]]) -> None:
    """Prints what is compiled for TPUs; a reproducible step has its norm in float64, which a TPU emulates."""
    if chips:
        head("Compiled for TPUs, nothing run", "topology", "chips", "parameters", "reproducible", *FIGURES)
    for (topology, devices), power, reproducible in itertools.product(chips.items(), powers, (False, True)):
        try:
            cells = figures(compile_step(10**power, devices, reproducible))
        except jax.errors.JaxRuntimeError as error:
            sizes = re.findall(r"\(([\d.]+[KMGT])\)", str(error))
            if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
                raise
            cells = ["-", "-", f"does not fit: {sizes[0]}iB of {sizes[1]}iB", "-", "-", "-"]
        print(line(topology, str(len(devices)), f"1e{power}", str(reproducible), *cells), flush=True)


def head(title: str, *columns: str) -> None:
    """The first lines of a table."""
    print("", f"**{title}**", "", line(*columns), line(*("---:" for _ in columns)), sep="\n", flush=True)


def compile_step(size: int, devices: Sequence[jax.Device], reproducible: bool = False) -> Step:
    """Compiles a step for arrays that are shapes alone."""
    shape = matrix(size, len(devices))
    mesh = Mesh(np.array(devices), ("x",))
    cut, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    transformation = optloss.transformation(
        0, 1e-3, "Adam", gradient_noise_scale=0.01, clip_gradients=1.0, key=0, reproducible=reproducible
    )
    params = {f"matrix_{i}": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=cut) for i in range(MATRICES)}
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cut if leaf.shape == shape else whole),
        jax.eval_shape(transformation.init, params),
    )

    def step(gradients: Any, state: Any, params: Any) -> tuple[Any, Any, Any]:
        updates, state = transformation.update(gradients, state, params)
        return updates, state, optax.apply_updates(params, updates)

    jax.clear_caches()  # other numbers of devices have the same trace
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, state, params).compile()
    return Step(compiled, transformation, (params, state, params), time.perf_counter() - start)


def matrix(size: int, devices: int) -> tuple[int, int]:
    """The shape of a matrix: its rows divide by eight devices and by a TPU's tiles, its columns are a power of two."""
    columns = 2 ** round(math.log2(math.sqrt(size / MATRICES)))
    multiple = 8 * max(8, devices)
    return max(1, round(size / MATRICES / columns / multiple)) * multiple, columns


def figures(step: Step) -> list[str]:
    """What a device holds and sends, and what the compilation took."""
    memory, text = step.compiled.memory_analysis(), step.compiled.as_text()
    params = step.arguments[2].values()
    parts = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in params]
    held = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    shapes = set(re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text))
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    always, rarely = collectives(text)
    return [
        *(f"{size / sum(parts):.3f}" for size in held),
        f"{sum(held) / 1e9:.3g}",
        f"{always} ({rarely})",
        f"{largest / max(parts):.3g}",
        f"{step.seconds:.1f} s",
    ]


def collectives(text: str) -> tuple[int, int]:
    """The collectives of a program that always run, and those in branches of it."""
    branches = {name for found in BRANCHES.findall(text) for name in re.findall(r"%([\w.\-]+)", "".join(found))}
    counts = {True: 0, False: 0}
    for block in re.split(r"\n(?=%|ENTRY )", text):
        name = re.match(r"(?:ENTRY )?%([\w.\-]+) ", block)
        counts[name is not None and name[1] in branches] += len(COLLECTIVE.findall(block))
    return counts[False], counts[True]


def step_seconds(steps: Sequence[Step], rounds: int) -> list[float]:
    """The median seconds of each, which run in turns; the updates of a step are the gradients of the next."""
    carries = [initial(step) for step in steps]
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(WARM_UPS + rounds):
        for i, step in enumerate(steps):
            time.sleep(PAUSE)
            start = time.perf_counter()
            carries[i] = jax.block_until_ready(step.compiled(*carries[i]))
            seconds[i].append(time.perf_counter() - start)
    return [statistics.median(taken[WARM_UPS:]) for taken in seconds]


def initial(step: Step) -> tuple[Any, Any, Any]:
    """Gradients of 0, to which the step adds noise, the first state, and parameters of 0."""
    like, state, _ = step.arguments
    gradients, params = (jax.tree.map(lambda leaf: jnp.zeros_like(leaf, device=leaf.sharding), like) for _ in range(2))
    init = jax.jit(step.transformation.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))
    return gradients, init(params), params


if __name__ == "__main__":
    main()
