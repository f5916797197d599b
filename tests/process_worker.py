"""One process of several, started by test_processes.py: trains, and prints a line of JSON.

python tests/process_worker.py PORT PROCESSES PROCESS DEVICES CASE
"""

import functools
import hashlib
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import layouts
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optloss


def start(port: str, processes: int, process: int, devices: int) -> None:
    """Makes the devices and meets the other processes; nothing may be computed before."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_platforms", "cpu")
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        limits = {"initialization_timeout": 60, "heartbeat_timeout_seconds": 10}
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process, **limits)


def whole(leaf: jax.Array) -> np.ndarray:
    """An array brought together on this process."""
    everywhere = NamedSharding(leaf.sharding.mesh, P())
    return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(leaf).addressable_data(0))


def train(kind: str, optimizer: str, clip: str) -> dict[str, Any]:
    """The digest of each array of the state after training as tests/test_layouts.py does."""
    from test_layouts import settings_of

    state = layouts.train_on_mesh(kind, 8, AxisType.Auto, settings_of(optimizer, clip))
    return {
        jax.tree_util.keystr(path): hashlib.blake2b(whole(leaf).tobytes(), digest_size=8).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


class Halving:
    """A decay in which no function tells how fast."""

    def __init__(self, factor: float) -> None:
        """With the factor of ten steps."""
        self.factor = factor

    def __call__(self, rate: Any, step: Any) -> Any:
        """The rate at a step."""
        return optloss.exponential_decay(rate, step, 10, self.factor)


def halving(factor: float, rate: Any, step: Any) -> Any:
    return Halving(factor)(rate, step)


def disagree(what: str) -> dict[str, Any]:
    """What `init` says where this process differs from the other."""
    own: dict[str, Any] = {"learning_rate": 0.1, "optimizer": "Adam", "clip_gradients": 1.0}
    first, key = 1.0, 0
    if jax.process_index() == 1:
        changed = {"rate": {"learning_rate": 0.2}, "clip": {"clip_gradients": 2.0}, "optimizer": {"optimizer": "SGD"}}
        own.update(changed.get(what, {}))
        first, key = (1.5, 0) if what == "parameters" else (1.0, 7 if what == "seed" else 0)
    factor = 0.5 if what in ("function", "partial", "hidden") and jax.process_index() == 1 else 0.9
    decays = {"partial": functools.partial(halving, factor), "hidden": Halving(factor)}
    decays |= {"partial of equals": decays["partial"], "equal objects": decays["hidden"]}
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P())
    # As a user makes them who does not compare: each process puts its own copy where it belongs.
    shards = [jax.device_put(np.array([first, 2.0], np.float32), device) for device in jax.local_devices()]
    params = {"b": jnp.zeros(2), "w": jax.make_array_from_single_device_arrays((2,), sharding, shards)}
    if what == "structure" and jax.process_index() == 1:
        params["c"] = jnp.zeros(1)
    op = optloss.optimize_loss(
        lambda params: jnp.sum(params["w"]),
        0,
        gradient_noise_scale=0.1,
        learning_rate_decay_fn=decays.get(what, lambda rate, step: halving(factor, rate, step)),
        **own,
    )
    try:
        op.init(params, key=key)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


if __name__ == "__main__":
    start(sys.argv[1], *map(int, sys.argv[2:5]))
    name, *arguments = sys.argv[5].split(":")
    print("RESULT", json.dumps({"train": train, "disagree": disagree}[name](*arguments)), flush=True)
