"""Trains plain arrays in a NamedTuple, without any framework, K steps in one program by `jax.lax.scan`.

    python examples/plain_trees.py

Any tree of arrays is a tree of parameters, and its paths are their names: here `hidden/weight`, `hidden/bias` and so
on. The digits are the 1,797 images of 8x8 pixels that scikit-learn ships; nothing is downloaded. The last line is

    test accuracy 97.8 % after 1000 steps, 50 in each program (log and picture: runs/plain_trees)
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optloss
from optloss import pictures, tensorboard


class Layer(NamedTuple):
    """The arrays of a dense layer."""

    weight: jax.Array  # shape=(inputs, outputs)
    bias: jax.Array  # shape=(outputs,)


class Network(NamedTuple):
    """Its parameters."""

    hidden: Layer
    answer: Layer


def new_layer(draw, inputs, outputs):
    """A layer with weights drawn at random."""
    weight = draw.normal(0, (2 / inputs) ** 0.5, (inputs, outputs))
    return Layer(weight.astype(np.float32), np.zeros(outputs, np.float32))


def apply(network, images):
    """The logits of a batch."""
    hidden = jax.nn.relu(images @ network.hidden.weight + network.hidden.bias)
    return hidden @ network.answer.weight + network.answer.bias


def loss(network, batch):
    """Mean cross-entropy and accuracy."""
    images, labels = batch
    logits = apply(network, images)
    odds = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -odds.mean(), jnp.mean(logits.argmax(-1) == labels)


def main():
    """Trains, draws and tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="a multiple of --scan")
    parser.add_argument("--scan", type=int, default=50, help="steps in one program")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, noise and order")
    parser.add_argument("--out", default="runs/plain_trees", help="folder of the log and the picture")
    args = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    images, tests, labels, answers = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)

    train = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=0.2,
        optimizer="Momentum",
        gradient_noise_scale=lambda step: 1e-2 / (1 + step) ** 0.55,
        gradient_multipliers={"*/bias": 2.0},
        clip_gradients=optloss.adaptive_clipping_fn(global_step=True, report_summary=True),
        learning_rate_decay_fn=lambda rate, step: optloss.polynomial_decay(rate, step, args.steps, 1e-3),
        has_aux=True,
    )
    run = jax.jit(lambda state, batches: jax.lax.scan(train.update, state, batches), donate_argnums=0)

    draw, history = np.random.default_rng(args.seed), []
    state = train.init(Network(new_layer(draw, 64, 128), new_layer(draw, 128, 10)), key=args.seed)
    bar = tensorboard.ProgressBar(tqdm(total=args.steps, unit="step"))
    log = tensorboard.EventFileWriter(args.out, purge_step=0)  # it replaces what an earlier run left there
    with tensorboard.AsyncWriter(bar, log, lambda values, step: history.append(values)) as writer:
        for first in range(0, args.steps, args.scan):
            chosen = draw.integers(len(images), size=(args.scan, 64))
            state, outputs = run(state, (images[chosen], labels[chosen]))
            writer.write({**outputs.summaries, "accuracy": outputs.aux}, first)  # those of all these steps

    pictures.draw_run(history).savefig(f"{args.out}/run.png")
    accuracy = 100 * np.mean(apply(state.params, tests).argmax(-1) == answers)
    print(
        f"test accuracy {accuracy:.1f} % after {state.global_step} steps, {args.scan} in each program "
        f"(log and picture: {args.out})"
    )


if __name__ == "__main__":
    main()
