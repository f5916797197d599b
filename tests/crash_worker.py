"""A run that may be killed at any moment, started by test_crash.py: it goes on from its last checkpoint.

    python tests/crash_worker.py FOLDER LOG STEPS EVERY [PORT PROCESSES PROCESS DEVICES]

It writes a line "step digest" to LOG for each step, of the batch and the whole state after it, and "end digest" when it
is done, with the arrays of its last state in FOLDER/end.npz. FOLDER/checkpoints is all that goes from start to start.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optloss

INPUTS, HIDDEN, OUTPUTS, BATCH = 16, 32, 8, 32  # eight devices divide each of them
BAD_STEP = 7  # whose batch is not finite, so that the count of such steps is not 0


def start(port: str = "", processes: str = "1", process: str = "0", devices: str = "1") -> None:
    """Makes the devices and meets the other processes; nothing may be computed before."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        limits = {"initialization_timeout": 120, "heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 10}
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process), **limits)


def loss(params: Any, mean: jax.Array, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The squared error of a network of one hidden layer; the model state is a moving average of its inputs."""
    x, y = batch
    mean = 0.9 * mean + 0.1 * jnp.mean(x, axis=0)
    hidden = jnp.tanh((x - mean) @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean(jnp.square(hidden @ params["out"]["kernel"] - y)), mean


def make_train() -> optloss.TrainOp:
    """With everything on that has a state or hangs on the step."""
    return optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=0.01,
        optimizer="Adam",
        gradient_noise_scale=lambda step: 0.01 / (1.0 + 0.1 * step),
        gradient_multipliers={"out/*": 0.5, "hidden/bias": lambda step: 1.0 / (1.0 + 0.1 * step)},
        clip_gradients=optloss.adaptive_clipping_fn(std_factor=0.5, global_step=True, report_summary=True),
        learning_rate_decay_fn=lambda rate, step: optloss.exponential_decay(rate, step, 20, 0.9),
    )


def initial_params() -> dict[str, dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": draw.normal(0, 0.3, (INPUTS, HIDDEN)), "bias": np.zeros(HIDDEN)},
        "out": {"kernel": draw.normal(0, 0.3, (HIDDEN, OUTPUTS))},
    }
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


def make_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """A function of the step alone, so that a run that goes on sees what it would have seen."""
    x = np.random.default_rng((1, step)).normal(0.2, 1.0, (BATCH, INPUTS)).astype(np.float32)
    return x * np.float32(np.nan if step == BAD_STEP else 1.0), np.sin(x[:, :OUTPUTS] + x[:, OUTPUTS:])


def digest_of(*trees: Any) -> str:
    content = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(trees):
        content.update(f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return content.hexdigest()


def train(folder: Path, log: Path, steps: int, every: int) -> None:
    """Trains from the last checkpoint on."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    bring_together = jax.jit(lambda tree: tree, out_shardings=everywhere)
    op = make_train()
    state = op.init(jax.device_put(initial_params(), rows), key=0, model_state=jnp.zeros(INPUTS))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with open(log, "a", buffering=1) as lines:  # each line at once: nothing is lost where the process is killed
        with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
            first = manager.latest_step() or 0
            if first:
                state = manager.restore(first, args=ocp.args.StandardRestore(state))
            for step in range(first, steps):
                batch = make_batch(step)
                parts = [jax.make_array_from_callback(x.shape, rows, x.__getitem__) for x in batch]
                state, _ = op.update(state, parts)
                lines.write(f"{step} {digest_of(batch, jax.device_get(bring_together(state)))}\n")
                if (step + 1) % every == 0 or step + 1 == steps:
                    manager.save(step + 1, args=ocp.args.StandardSave(state))  # it copies, and writes as we go on
        end = jax.device_get(bring_together(state))
        if jax.process_index() == 0:
            named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(end)}
            np.savez(folder / "end.npz", **named)
        lines.write(f"end {digest_of(end)}\n")


if __name__ == "__main__":
    start(*sys.argv[5:])
    train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
