"""Trains a byte-level transformer that can be stopped at any time: its checkpoints go on to the bit where it was.

    python examples/transformer.py

It reads Python's own standard library and learns to guess the next byte; nothing is downloaded. It ends with

    bits per byte of unseen text: 8.04 at step 0, 2.85 at step 600
    parameters: 2,643,520, digest f83f3a5c (checkpoints, log and picture: runs/transformer)

where the figures hang on the machine and on Python's version. Stop it by Ctrl-C or `kill -9` and give the same command
again: it goes on from the last checkpoint, to the same digest as without a stop. `--steps` is the total: `--steps 900`
trains it further. `tensorboard --logdir runs` shows the gradient norm of every layer.
"""

import argparse
import hashlib
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

import optloss
from optloss import pictures, tensorboard


class Transformer(nn.Module):
    """Guesses each byte of a text from those before it."""

    width: int
    layers: int = 2

    @nn.compact
    def __call__(self, text):  # noqa: D102
        x = nn.Embed(256, self.width)(text) + nn.Embed(text.shape[1], self.width)(jnp.arange(text.shape[1]))
        for i in range(self.layers):  # the names are those of the summaries: layer_0_attend/query/kernel
            attend = nn.MultiHeadDotProductAttention(self.width // 32, use_bias=False, name=f"layer_{i}_attend")
            x = x + attend(nn.RMSNorm()(x), mask=nn.make_causal_mask(text))
            hidden = nn.gelu(nn.Dense(4 * self.width, use_bias=False, name=f"layer_{i}_in")(nn.RMSNorm()(x)))
            x = x + nn.Dense(self.width, use_bias=False, name=f"layer_{i}_out")(hidden)
        return nn.Dense(256, use_bias=False)(nn.RMSNorm()(x))


def read_library():
    """The modules of the standard library as bytes: nine of ten to train on, and the tenth to test."""
    modules = [path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    texts = b"".join(text for i, text in enumerate(modules) if i % 10), b"".join(modules[::10])
    return [np.frombuffer(text, np.uint8) for text in texts]


def pieces(text, size, *seed, length=65):
    """Pieces of a text from places that hang on the seed alone: a run that goes on sees what it would have seen."""
    starts = np.random.default_rng(seed).integers(len(text) - length, size=(size, 1))
    return text[starts + np.arange(length)].astype(np.int32)


def make_train(network, decay_steps):
    """Returns the loss, the mean cross-entropy of all bytes but the first of each piece, in bits; and its train op."""

    def loss(params, batch):
        logits = network.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean() / np.log(2)

    return loss, optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=2e-3,
        optimizer="Adam",
        clip_gradients=optloss.adaptive_clipping_fn(global_step=True, report_summary=True),
        learning_rate_decay_fn=lambda rate, step: (  # the first tenth is a warm-up
            optloss.cosine_decay(rate, step, decay_steps, alpha=0.05) * jnp.minimum(1, 10 * (step + 1) / decay_steps)
        ),
        summaries=["loss", "learning_rate", "global_gradient_norm", "gradient_norm"],
    )


def main():
    """Trains from the last checkpoint on, tests, logs and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="in total, those of earlier runs among them")
    parser.add_argument("--decay-steps", type=int, default=600, help="to the lowest rate")
    parser.add_argument("--every", type=int, default=50, help="steps from checkpoint to checkpoint")
    parser.add_argument("--width", type=int, default=320, help="of the transformer, a multiple of 32")
    parser.add_argument("--out", default="runs/transformer", help="folder of checkpoints, log and picture")
    args = parser.parse_args()
    (text, unseen), network, history = read_library(), Transformer(args.width), []
    loss, train = make_train(network, args.decay_steps)
    bits, tests = jax.jit(loss), pieces(unseen, 128, 0)
    state = train.init(jax.jit(network.init)(jax.random.key(0), tests[:, 1:])["params"])
    out = Path(args.out).resolve()  # Orbax takes no other
    with ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        first = manager.latest_step() or 0
        if first:
            state = manager.restore(first, args=ocp.args.StandardRestore(state))
        before = bits(state.params, tests)
        with tensorboard.AsyncWriter(
            tensorboard.ProgressBar(tqdm(total=args.steps, initial=first, unit="step")),
            tensorboard.EventFileWriter(out, purge_step=first),  # an earlier log counts up to there
            lambda values, step: history.append(values),
        ) as writer:
            for step in range(first, args.steps):
                state, output = train.update(state, pieces(text, 8, 1, step))
                writer.write(output.summaries, step)
                if (step + 1) % args.every == 0 or step + 1 == args.steps:
                    manager.save(step + 1, args=ocp.args.StandardSave(state))  # it copies, and writes as we go on
    if history:
        pictures.draw_run(history, range(first, args.steps)).savefig(out / "run.png")
    leaves, after = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)], bits(state.params, tests)
    digest = hashlib.blake2b(b"".join(leaf.tobytes() for leaf in leaves), digest_size=4).hexdigest()
    print(f"bits per byte of unseen text: {before:.2f} at step {first}, {after:.2f} at step {max(first, args.steps)}")
    print(f"parameters: {sum(map(np.size, leaves)):,}, digest {digest} (checkpoints, log and picture: {args.out})")


if __name__ == "__main__":
    main()
