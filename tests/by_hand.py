"""One training loop three times: in TensorFlow 1, with optloss, and by hand with Flax and Optax.

    python tests/by_hand.py

prints the table of the README. What it counts is the lines between `# begin` and `# end`, without blanks and comments.
"""

import functools
import html
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from flax.traverse_util import path_aware_map

import optloss

Loss: TypeAlias = Callable[[Any, Any], jax.Array]  # of parameters and batch
Steps: TypeAlias = Iterator[tuple[Any, dict[str, jax.Array]]]  # state and summaries after each step

# Of `x`, `y` and `loss` in the default graph. It has no guard against steps that are not finite.
TF1 = """
import tensorflow as tf

# begin
step = tf.train.get_or_create_global_step()
train_op = tf.contrib.layers.optimize_loss(
    loss,
    global_step=step,
    learning_rate=0.1,
    optimizer="Adam",
    gradient_noise_scale=0.01,
    gradient_multipliers={"embed/kernel:0": 0.1, "embed/bias:0": 0.1},
    clip_gradients=tf.contrib.layers.adaptive_clipping_fn(global_step=step),
    learning_rate_decay_fn=lambda rate, step: tf.train.exponential_decay(rate, step, 1000, 0.96),
    variables=tf.trainable_variables("embed/") + tf.trainable_variables("dense/"),
)
summaries = tf.summary.merge_all()
with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    for images, labels in batches:
        value, figures = session.run([train_op, summaries], {x: images, y: labels})
# end
"""


def ours(loss: Loss, params: Any, batches: Iterable[Any], scale: float) -> Steps:
    """The loop with `optimize_loss`."""
    # begin
    train = optloss.optimize_loss(
        loss,
        global_step=0,
        learning_rate=0.1,
        optimizer="Adam",
        gradient_noise_scale=scale,
        gradient_multipliers={"embed/*": 0.1},
        clip_gradients=optloss.adaptive_clipping_fn(global_step=True),
        learning_rate_decay_fn=lambda rate, step: optloss.exponential_decay(rate, step, 1000, 0.96),
        variables=["embed/*", "dense/*"],
    )
    state = train.init(params, key=0)
    for batch in batches:
        state, out = train.update(state, batch)
        # end
        yield state, out.summaries


def by_hand(loss: Loss, params: Any, batches: Iterable[Any], scale: float) -> Steps:
    """The loop with `TrainState` and Optax.

    The clip and the noise stand in the step: as transformations of a chain each would be an init and an update more,
    and the norms would have to be kept in the state and looked up there.
    """

    # begin
    class State(TrainState):
        frozen: Any
        mean: jax.Array
        variance: jax.Array
        nonfinite_steps: jax.Array

    def truncated_normal(key, shape, dtype):
        return jax.random.truncated_normal(key, -2, 2, shape, dtype)

    # TF1's epsilon is added before the bias correction of the root, Optax's after it.
    def epsilon(count):
        return 1e-8 / jnp.sqrt(1 - 0.999 ** (count + 1))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        value, grads = jax.value_and_grad(lambda trained: loss(trained | state.frozen, batch))(state.params)
        key = jax.random.fold_in(jax.random.key(0), state.step)
        grads = optax.tree.add_scale(grads, scale, optax.tree.random_like(key, grads, truncated_normal))
        grads = path_aware_map(lambda path, grad: 0.1 * grad if path[0] == "embed" else grad, grads)
        norm = optax.tree.norm(grads)
        decay = jnp.minimum(0.95, state.step / (state.step + 1))
        distance = jnp.log(norm + 1e-8) - state.mean
        mean = state.mean + (1 - decay) * distance
        variance = decay * (state.variance + (1 - decay) * distance**2)
        max_norm = jnp.exp(mean + 2 * jnp.sqrt(jnp.maximum(1e-8, variance)))
        clipped = optax.tree.scale(jnp.where(norm < max_norm, 1, jnp.exp(mean) / norm), grads)
        new = state.apply_gradients(grads=clipped, mean=mean, variance=variance)
        summaries = {
            "OptimizeLoss/loss": value,
            "OptimizeLoss/learning_rate": new.opt_state.hyperparams["learning_rate"],
            "OptimizeLoss/global_norm/gradient_norm": norm,
            "OptimizeLoss/global_norm/clipped_gradient_norm": optax.tree.norm(clipped),
        }
        # Not `apply_if_finite`: it looks at the gradients alone, and gives in after a number of bad steps.
        finite = jax.tree.reduce(lambda ok, leaf: ok & jnp.isfinite(leaf).all(), (value, norm, new), True)
        new = jax.tree.map(functools.partial(jnp.where, finite), new, state)
        return new.replace(nonfinite_steps=state.nonfinite_steps + ~finite), summaries

    trained = {name: params[name] for name in ("embed", "dense")}
    state = State.create(
        apply_fn=None,
        params=trained,
        tx=optax.inject_hyperparams(optax.adam)(optax.exponential_decay(0.1, 1000, 0.96), eps=epsilon),
        frozen={name: params[name] for name in params.keys() - trained.keys()},
        mean=jnp.zeros(()),
        variance=jnp.zeros(()),
        nonfinite_steps=jnp.zeros((), jnp.int32),
    ).replace(step=jnp.zeros((), jnp.int32))
    for batch in batches:
        state, summaries = train_step(state, batch)
        # end
        yield state, summaries


def loops() -> dict[str, list[str]]:
    """The code of each loop, without blanks, comments and indentation in common."""
    sources = {"tf1": TF1, "ours": inspect.getsource(ours), "hand": inspect.getsource(by_hand)}
    return {name: _lines(source) for name, source in sources.items()}


def _lines(source: str) -> list[str]:
    lines = source.splitlines()
    begin, end = ([line.strip() for line in lines].index(f"# {mark}") for mark in ("begin", "end"))
    code = [line for line in lines[begin + 1 : end] if line.strip() and line.strip()[0] != "#"]
    return textwrap.dedent("\n".join(code)).splitlines()


def counts() -> dict[str, int]:
    """The lines of each loop."""
    return {name: len(lines) for name, lines in loops().items()}


def table() -> str:
    """The table of the README."""
    tf1, own, hand = (html.escape("\n".join(lines), quote=False) for lines in loops().values())
    tf1, own, hand = (code.replace("|", "&#124;").replace("\n", "<br>") for code in (tf1, own, hand))
    count = counts()
    rows = [
        "| | TensorFlow 1 | optloss | Flax and Optax, by hand |",
        "| --- | --- | --- | --- |",
        f"| lines | {count['tf1']} | {count['ours']} | {count['hand']} |",
        "| steps that are not finite | destroy the parameters | are skipped and counted | are skipped and counted |",
        f"| code | <pre>{tf1}</pre> | <pre>{own}</pre> | <pre>{hand}</pre> |",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
