"""Fine-tunes a network that reads digits on another question with few examples, with a part of it frozen.

    python examples/finetune.py

It learns to read scikit-learn's 1,797 digits of 8x8 pixels, which need no download, and then, of 30 images alone,
which of them are odd. `variables` names what is trained: the rest has no gradient and no slots and stays as it is to
the bit. `gradient_multipliers` has one layer learn ten times slower than the new last one. That is why the optimizer
is Momentum: Adam, Adagrad and RMSProp divide a gradient by its own size, and so the multiplier out. The last lines are

    odd or even: 94.0 % of test images right when fine-tuned on 30, 89.3 % when trained from scratch on them
    trained: 32,962 of 42,530 parameters, with 131,848 bytes of slots; the others are the same to the bit
"""

import argparse

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optloss
from optloss import tensorboard


class Network(nn.Module):
    """Two convolutions and two dense layers."""

    classes: int

    @nn.compact
    def __call__(self, x):  # noqa: D102
        x = nn.relu(nn.Conv(32, (3, 3), name="conv_1")(x))
        x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3), name="conv_2")(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(64, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(self.classes, name="last")(x)


def logits(params, images):
    """The scores of the classes, as many as the last layer has."""
    return Network(len(params["last"]["bias"])).apply({"params": params}, images)


def loss(params, batch):
    """Mean cross-entropy."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()


def fit(train, params, images, labels, steps, seed):
    """Returns the state after some steps on batches of 32 drawn at random."""
    state, draw = train.init(params), np.random.default_rng(seed)
    with tensorboard.AsyncWriter(tensorboard.ProgressBar(tqdm(total=steps, unit="step"))) as writer:
        for step in range(steps):
            chosen = draw.integers(len(images), size=32)
            state, output = train.update(state, (images[chosen], labels[chosen]))
            writer.write(output.summaries, step)
    return state


def accuracy(params, images, labels):
    """The percentage of images whose best score is that of their class."""
    return 100 * np.mean(logits(params, images).argmax(axis=-1) == labels)


def main():
    """Trains on one task, fine-tunes on the other, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of each of the three trainings")
    parser.add_argument("--examples", type=int, default=30, help="of odd and even digits")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, order and examples")
    args = parser.parse_args()
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    images, tests, digits, answers = train_test_split(images, digits, test_size=0.25, stratify=digits, random_state=0)
    few, _, labels, _ = train_test_split(
        images, digits % 2, train_size=args.examples, stratify=digits, random_state=args.seed
    )
    settings = {
        "global_step": 0,
        "learning_rate": 0.05,
        "optimizer": "Momentum",
        "clip_gradients": 1.0,
        "learning_rate_decay_fn": lambda rate, step: optloss.cosine_decay(rate, step, args.steps),
    }
    whole = optloss.optimize_loss(loss, **settings)
    part = optloss.optimize_loss(
        loss, **settings, variables=["hidden/*", "last/*"], gradient_multipliers={"hidden/*": 0.1}
    )

    keys = jax.random.split(jax.random.key(args.seed))
    known = fit(whole, Network(10).init(keys[0], few)["params"], images, digits, args.steps, args.seed).params
    new = Network(2).init(keys[1], few)["params"]
    start = known | {"last": new["last"]}  # two classes instead of ten
    tuned = fit(part, start, few, labels, args.steps, args.seed)
    scratch = fit(whole, new, few, labels, args.steps, args.seed)

    for layer in ("conv_1", "conv_2"):
        for name, array in start[layer].items():
            assert np.asarray(array).tobytes() == np.asarray(tuned.params[layer][name]).tobytes(), f"{layer}/{name}"
    total = sum(leaf.size for leaf in jax.tree.leaves(start))
    trained = sum(leaf.size for layer in ("hidden", "last") for leaf in jax.tree.leaves(start[layer]))
    slots = sum(leaf.nbytes for leaf in jax.tree.leaves(tuned.opt_states["OptimizeLoss"].optimizer))
    right, without = (accuracy(state.params, tests, answers % 2) for state in (tuned, scratch))
    print(
        f"odd or even: {right:.1f} % of test images right when fine-tuned on {len(few)}, "
        f"{without:.1f} % when trained from scratch on them"
    )
    print(
        f"trained: {trained:,} of {total:,} parameters, with {slots:,} bytes of slots; "
        "the others are the same to the bit"
    )


if __name__ == "__main__":
    main()
