"""Trains a small transformer with every array of the state cut over all devices (fully sharded data parallelism).

    python examples/fsdp.py

It reads Python's own standard library, byte by byte, and learns to guess the next one; nothing is downloaded. Each
device keeps its part of every parameter and of Adam's slots, and works on its share of every batch; the parameters that
this takes, XLA gathers as they are needed. Without a GPU or TPU the processor stands for eight devices. It ends with

    bits per byte of unseen text: 8.43 before, 2.92 after 400 steps
    devices: 8, each with 1,485 of 11,882 kB of parameters and slots

where the first hangs somewhat on Python's version, whose library it is, and on the machine; it takes about a minute.
"""

import argparse
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import optloss


class Transformer(nn.Module):
    """Guesses each byte of a text from those before it."""

    width: int
    layers: int
    rows: NamedSharding  # of a batch: activations are held to it, so that it is the parameters that travel

    @nn.compact
    def __call__(self, text):  # noqa: D102
        x = nn.Embed(256, self.width)(text) + nn.Embed(text.shape[1], self.width)(jnp.arange(text.shape[1]))
        for _ in range(self.layers):
            x = jax.lax.with_sharding_constraint(x, self.rows)
            attend = nn.MultiHeadDotProductAttention(self.width // 32, use_bias=False)
            x = x + attend(nn.RMSNorm()(x), mask=nn.make_causal_mask(text))
            hidden = nn.gelu(nn.Dense(4 * self.width, use_bias=False)(nn.RMSNorm()(x)))
            x = x + nn.Dense(self.width, use_bias=False)(hidden)
        return nn.Dense(256, use_bias=False)(nn.RMSNorm()(x))


def loss(network, params, text):
    """Mean cross-entropy of all bytes of a batch but the first of each piece, in bits."""
    logits = network.apply({"params": params}, text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean() / np.log(2)


def cut(array, mesh):
    """The array cut along the largest dimension that has an equal part for each device; whole on all if none has."""
    fits = [size * (size % mesh.size == 0) for size in array.shape]
    spec = PartitionSpec(*[None] * int(np.argmax(fits)), "x") if any(fits) else PartitionSpec()
    return jax.device_put(array, NamedSharding(mesh, spec))


def fit(network, params, batches):
    """Returns the state after a step on each batch."""
    train = optloss.optimize_loss(
        lambda params, text: loss(network, params, text),
        global_step=0,
        learning_rate=2e-3,
        optimizer="Adam",
        clip_gradients=1.0,
        learning_rate_decay_fn=lambda rate, step: (  # the first tenth is a warm-up
            optloss.cosine_decay(rate, step, len(batches)) * jnp.minimum(1, 10 * (step + 1) / len(batches))
        ),
        colocate_gradients_with_ops=True,  # each gradient is cut as its parameter is
    )
    state = train.init(params)
    for step, batch in enumerate(bar := tqdm(batches, unit="step")):
        state, output = train.update(state, jax.device_put(batch, network.rows))
        if step % 10 == 0:
            bar.set_postfix(bits=f"{output.loss:.2f}")
    return state


def read_library():
    """The modules of the standard library as bytes: nine of ten to train on, and the tenth to test."""
    modules = [path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    texts = b"".join(text for i, text in enumerate(modules) if i % 10), b"".join(modules[::10])
    return [np.frombuffer(text, np.uint8) for text in texts]


def pieces(draw, text, *shape, length=33):
    """Pieces of a text from places drawn at random."""
    return text[draw.integers(len(text) - length, size=(*shape, 1)) + np.arange(length)].astype(np.int32)


def main():
    """Trains, tests and counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=192, help="of the transformer, a multiple of 32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--devices", type=int, default=8, help="that the processor stands for, without a GPU or TPU")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)  # before the first array; of GPUs and TPUs all are taken
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    network = Transformer(args.width, args.layers, rows=NamedSharding(mesh, PartitionSpec("x")))
    (text, unseen), draw = read_library(), np.random.default_rng(0)
    size = -(-16 // mesh.size) * mesh.size  # of a batch: 16, or the next multiple of the devices
    tests, bits = jax.device_put(pieces(draw, unseen, 32 * size), network.rows), jax.jit(loss, static_argnums=0)
    params = jax.jit(network.init)(jax.random.key(0), tests[:size, 1:])["params"]
    params = jax.tree.map(lambda array: cut(array, mesh), params)
    before = bits(network, params, tests)
    state = fit(network, params, pieces(draw, text, args.steps, size))
    after, leaves = bits(network, state.params, tests), jax.tree.leaves(state)
    held, total = sum(leaf.addressable_data(0).nbytes for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    print(f"bits per byte of unseen text: {before:.2f} before, {after:.2f} after {args.steps} steps")
    print(f"devices: {mesh.size}, each with {held / 1e3:,.0f} of {total / 1e3:,.0f} kB of parameters and slots")


if __name__ == "__main__":
    main()
