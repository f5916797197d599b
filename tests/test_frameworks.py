"""Flax, NNX, Haiku, Equinox and plain trees: their names, their loops, and their batch statistics."""

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import optloss

EXAMPLES = Path(__file__).parents[1] / "examples"


class Case(NamedTuple):
    """A dense layer with BatchNorm and one for the answer, as a framework's users write it."""

    loss: Callable[..., Any]  # (params, model_state, images, labels) -> (scalar, model_state)
    params: Any
    model_state: Any
    names: list[str]  # of the parameters, as its users know them


def cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def digits() -> tuple[Any, Any]:
    images, labels = load_digits(return_X_y=True)
    return (images[:96] / 16).astype(np.float32), labels[:96]


class LinenNetwork(nn.Module):
    """In Flax linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(32)(x)))
        return nn.Dense(10, name="answer")(x)


def flax_linen() -> Case:
    network = LinenNetwork()

    def loss(params: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, changed = network.apply(variables, images, mutable=["batch_stats"])
        return cross_entropy(logits, labels), changed["batch_stats"]

    variables = jax.jit(network.init)(jax.random.key(0), digits()[0])
    names = ["BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/bias", "Dense_0/kernel", "answer/bias", "answer/kernel"]
    return Case(loss, variables["params"], variables["batch_stats"], names)


class NnxNetwork(nnx.Module):
    """In Flax NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:  # noqa: D107
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(32, momentum=0.9, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.answer = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        return self.answer(self.dropout(nnx.relu(self.norms[0](self.hidden(x)))))


NNX_NAMES = ["answer/bias", "answer/kernel", "hidden/bias", "hidden/kernel", "norms/0/bias", "norms/0/scale"]


def flax_nnx() -> Case:
    graph, params, rest = nnx.split(NnxNetwork(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, rest: Any, images: Any, labels: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        return cross_entropy(model(images), labels), nnx.state(model, nnx.Not(nnx.Param))

    return Case(loss, params, rest, NNX_NAMES)


def haiku() -> Case:
    def forward(images: jax.Array) -> jax.Array:
        x = hk.BatchNorm(True, True, 0.9)(hk.nets.MLP([32])(images), is_training=True)
        return hk.Linear(10)(jax.nn.relu(x))

    network = hk.without_apply_rng(hk.transform_with_state(forward))

    def loss(params: Any, state: Any, images: Any, labels: Any) -> Any:
        logits, state = network.apply(params, state, images)
        return cross_entropy(logits, labels), state

    params, state = jax.jit(network.init)(jax.random.key(0), digits()[0])
    norm, last, first = "batch_norm", "linear", "mlp/~/linear_0"
    names = [f"{norm}/offset", f"{norm}/scale", f"{last}/b", f"{last}/w", f"{first}/b", f"{first}/w"]
    return Case(loss, params, state, names)


class EquinoxNetwork(eqx.Module):
    """In Equinox."""

    layers: list[Any]

    def __init__(self, key: jax.Array) -> None:  # noqa: D107
        first, second = jax.random.split(key)
        norm = eqx.nn.BatchNorm(32, axis_name="batch", momentum=0.9, mode="batch")
        self.layers = [eqx.nn.Linear(64, 32, key=first), norm, eqx.nn.Linear(32, 10, key=second)]

    def __call__(self, image: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:  # noqa: D102
        x, state = self.layers[1](self.layers[0](image), state)
        return self.layers[2](jax.nn.relu(x)), state


def equinox() -> Case:
    model, state = eqx.nn.make_with_state(EquinoxNetwork)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any, state: Any, images: Any, labels: Any) -> Any:
        apply = jax.vmap(eqx.combine(params, static), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, state = apply(images, state)
        return cross_entropy(logits, labels), state

    names = [f"layers/{layer}/{part}" for layer in range(3) for part in ("weight", "bias")]
    return Case(loss, params, state, names)


@pytest.fixture(scope="module", params=[flax_linen, flax_nnx, haiku, equinox], ids=lambda framework: framework.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    """Made once: `train.init` copies its arrays."""
    return request.param()


def test_names_are_those_that_users_of_a_framework_know(case: Case) -> None:
    assert optloss.parameter_names(case.params) == case.names


@pytest.mark.parametrize("argument", ["gradient_multipliers", "variables"])
def test_a_wrong_name_is_answered_with_the_names_of_the_framework(case: Case, argument: str) -> None:
    wrong, right = case.names[-1] + "s", case.names[-1]
    setting = {wrong: 0.5} if argument == "gradient_multipliers" else [wrong]
    train = optloss.optimize_loss(case.loss, 0, 0.1, "SGD", **{argument: setting})
    message = f"{argument}: no parameter is named {wrong!r}. Did you mean {right!r}? Parameters: "
    with pytest.raises(ValueError, match=re.escape(message + ", ".join(case.names))):
        train.init(case.params, model_state=case.model_state)


def bits(tree: Any) -> list[bytes]:
    """The bits of each array; of keys, those of their data."""
    leaves = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def train_case(case: Case, steps: int, **settings: Any) -> tuple[Any, list[float]]:
    """The state after some steps on the same batch, and their losses."""
    settings = {"learning_rate": 0.01, "optimizer": "Adam", **settings}
    train = optloss.optimize_loss(case.loss, 0, **settings)
    state, losses = train.init(case.params, model_state=case.model_state), []
    for _ in range(steps):
        state, output = train.update(state, *digits())
        losses.append(float(output.loss))
    return state, losses


def test_batch_statistics_follow_and_the_loss_falls_tenfold(case: Case) -> None:
    state, losses = train_case(case, 30)
    assert losses[-1] < losses[0] / 10
    moved = [new != old for new, old in zip(bits(state.model_state), bits(case.model_state), strict=True)]
    assert sum(moved) >= 2  # the mean and the variance; a key of NNX's dropout stays, its count does not


def test_without_update_ops_batch_statistics_keep_their_bits(case: Case) -> None:
    """The loss returns new ones all the same. What a user freezes besides, by its name, stays too."""
    frozen = case.names[0]
    state, losses = train_case(case, 15, update_ops=[], variables=case.names[1:])
    assert losses[-1] < losses[0] / 2
    assert bits(state.model_state) == bits(case.model_state)
    pairs = zip(case.names, bits(state.params), bits(case.params), strict=True)
    assert {name for name, new, old in pairs if new == old} == {frozen}


# One tree of parameters in three loops: a loss that is linear in them has the same gradients wherever they are.
SHAPES = {"hidden": {"bias": (4,), "kernel": (3, 4)}}
SETTINGS = {
    "global_step": 0,
    "learning_rate": 0.1,
    "optimizer": "Adam",
    "gradient_noise_scale": 0.5,
    "gradient_multipliers": {"hidden/kernel": 0.5, "*/bias": 2.0},
    "clip_gradients": 1.0,
    "learning_rate_decay_fn": lambda rate, step: optloss.exponential_decay(rate, step, 2, 0.5),
    "key": 7,
}


def drawn(seed: int) -> Any:
    draw = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: draw.normal(size=shape).astype(np.float32), SHAPES, is_leaf=is_shape)


def linear_loss(params: Any, gradients: Any) -> jax.Array:
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True))


class OneLayer(nnx.Module):
    """A module with a layer called hidden."""

    def __init__(self) -> None:  # noqa: D107
        self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))


def in_optimize_loss(settings: dict[str, Any], gradients: list[Any]) -> Any:
    train = optloss.optimize_loss(linear_loss, **settings)
    state = train.init(drawn(0))
    for gradient in gradients:
        state, _ = train.update(state, gradient)
    return state.params


def in_train_state(settings: dict[str, Any], gradients: list[Any]) -> Any:
    state = TrainState.create(apply_fn=None, params=drawn(0), tx=optloss.transformation(**settings))
    step = jax.jit(lambda state, gradient: state.apply_gradients(grads=gradient))
    for gradient in gradients:
        state = step(state, gradient)
    assert state.step == state.opt_state.global_step == len(gradients)
    return state.params


def in_nnx_optimizer(settings: dict[str, Any], gradients: list[Any]) -> Any:
    model = OneLayer()
    nnx.update(model, drawn(0))
    optimizer = nnx.Optimizer(model, optloss.transformation(**settings), wrt=nnx.Param)

    @nnx.jit
    def step(model: OneLayer, optimizer: Any, gradient: Any) -> None:
        loss, grads = nnx.value_and_grad(lambda model: linear_loss(nnx.state(model), gradient))(model)
        optimizer.update(model, grads, value=loss)

    for gradient in gradients:
        step(model, optimizer, gradient)
    assert optimizer.step[...] == optimizer.opt_state.global_step[...] == len(gradients)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("loop", [in_train_state, in_nnx_optimizer])
def test_a_loop_of_flax_ends_with_the_parameters_of_optimize_loss(loop: Callable[..., Any]) -> None:
    gradients = [drawn(seed) for seed in range(1, 6)]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),  # other kernels may round otherwise
        loop(SETTINGS, gradients),
        in_optimize_loss(SETTINGS, gradients),
    )


@pytest.mark.parametrize("loop", [in_train_state, in_nnx_optimizer])
def test_noise_in_a_loop_of_flax_is_that_of_the_parameters_names(loop: Callable[..., Any]) -> None:
    """NNX shows its variables to `init` and bare arrays to `update`: the names must not hang on that."""
    settings = {"global_step": 0, "learning_rate": 1.0, "optimizer": "SGD", "gradient_noise_scale": 1.0, "key": 7}
    nothing = jax.tree.map(np.zeros_like, drawn(0))
    noise = jax.tree.map(np.subtract, loop(settings, [nothing]), drawn(0))
    wanted = jax.tree.map(np.subtract, in_optimize_loss(settings, [nothing]), drawn(0))
    jax.tree.map(np.testing.assert_array_equal, noise, wanted)
    assert all(np.std(leaf) > 0.3 for leaf in jax.tree.leaves(noise))


def test_multipliers_and_variables_of_an_nnx_optimizer_go_by_names() -> None:
    settings = {"global_step": 0, "learning_rate": 1.0, "optimizer": "SGD"}
    ones = jax.tree.map(np.ones_like, drawn(0))
    for chosen in ({"gradient_multipliers": {"hidden/kernel": 0.0}}, {"variables": ["*/bias"]}):
        after = in_nnx_optimizer({**settings, **chosen}, [ones])
        np.testing.assert_array_equal(after["hidden"]["kernel"], drawn(0)["hidden"]["kernel"])
        np.testing.assert_array_equal(after["hidden"]["bias"], drawn(0)["hidden"]["bias"] - 1)


@pytest.mark.parametrize("wrong", ["hidden/kernal", "hidden/kernel/value"])
def test_a_wrong_name_in_an_nnx_optimizer_is_answered_with_nnxs_names(wrong: str) -> None:
    transformation = optloss.transformation(0, 0.1, "SGD", gradient_multipliers={wrong: 0.5})
    message = f"no parameter is named {wrong!r}. Did you mean 'hidden/kernel'? Parameters: {', '.join(NNX_NAMES)}."
    with pytest.raises(ValueError, match=re.escape(message)):
        nnx.Optimizer(NnxNetwork(nnx.Rngs(0)), transformation, wrt=nnx.Param)


def test_a_whole_nnx_network_learns_in_an_nnx_optimizer() -> None:
    """Its BatchNorm and dropout change inside the step, beside the optimizer, and the figures come out of it."""
    model = NnxNetwork(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optloss.transformation(0, 0.01, "Adam", clip_gradients=1.0), wrt=nnx.Param)

    @nnx.jit
    def step(model: NnxNetwork, optimizer: Any, images: Any, labels: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(images), labels))(model)
        optimizer.update(model, grads, value=loss)
        return loss

    losses = [float(step(model, optimizer, *digits())) for _ in range(30)]
    assert losses[-1] < losses[0] / 10
    assert float(jnp.abs(model.norms[0].mean[...]).max()) > 0
    assert optimizer.opt_state.summaries["OptimizeLoss/global_norm/clipped_gradient_norm"][...] <= 1


def test_a_scan_trains_a_namedtuple() -> None:
    class Layer(NamedTuple):
        weight: Any
        bias: Any

    def loss(params: Layer, batch: Any) -> jax.Array:
        images, labels = batch
        return cross_entropy(images @ params.weight + params.bias, labels)

    train = optloss.optimize_loss(loss, 0, 0.05, "Adam", gradient_multipliers={"bias": 2.0}, clip_gradients=1.0)
    batches = jax.tree.map(lambda x: np.stack([x] * 60), digits())
    state, outputs = jax.lax.scan(train.update, train.init(Layer(jnp.zeros((64, 10)), jnp.zeros(10))), batches)
    assert int(state.global_step) == 60
    assert optloss.parameter_names(state.params) == ["weight", "bias"]
    assert float(outputs.loss[0]) == pytest.approx(np.log(10), rel=1e-5)  # of ten equal odds
    assert float(outputs.loss[-1]) < float(outputs.loss[0]) / 10


def last_lines(example: str, pattern: str, *options: str) -> tuple[str, ...]:
    """What the groups of a pattern match at the end of what an example prints."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / example), *options]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found = re.search(pattern + r"\s*\Z", done.stdout)
    assert found, done.stdout
    return found.groups()


LAST_LINES = {
    "flax_batchnorm": (
        ["--steps", "100", "--tuning-steps", "60"],
        r"test accuracy (\d+\.\d) % after 100 steps\nupside down: (\d+\.\d) % before, (\d+\.\d) % after 60 steps of "
        r"fine-tuning, batch statistics equal to the bit",
        (90, 0, 60),
    ),
    "flax_train_state": (
        ["--steps", "100"],
        r"test accuracy (\d+\.\d) % after 100 steps, 0 of them skipped \(log: .+\)",
        (85,),
    ),
    "flax_nnx": (
        ["--steps", "100"],
        r"optimize_loss: test accuracy (\d+\.\d) % after 100 steps\n"
        r"nnx.Optimizer: test accuracy (\d+\.\d) % after 100 steps",
        (90, 90),
    ),
    "haiku_digits": (
        ["--steps", "80"],
        r"digits 0 to 4: test accuracy (\d+\.\d) % after 80 steps\n"
        r"all ten: (\d+\.\d) % before, (\d+\.\d) % after 80 more, first layer equal to the bit",
        (90, 0, 80),
    ),
    "equinox_digits": (
        ["--steps", "100"],
        r"test accuracy (\d+\.\d) % after 98 steps, 2 broken batches skipped \(log and picture: .+\)",
        (90,),
    ),
    "plain_trees": (
        ["--steps", "100", "--scan", "20"],
        r"test accuracy (\d+\.\d) % after 100 steps, 20 in each program \(log and picture: .+\)",
        (80,),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("example", LAST_LINES)
def test_an_example_of_a_framework_learns_in_a_short_run(example: str, tmp_path: Path) -> None:
    """By chance a tenth of the digits is read."""
    options, pattern, least = LAST_LINES[example]
    figures = last_lines(f"{example}.py", pattern, *options, "--out", str(tmp_path))
    assert all(float(figure) >= bound for figure, bound in zip(figures, least, strict=True)), figures
    if "picture" in pattern:
        assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.rglob("events.out.tfevents.*"))
