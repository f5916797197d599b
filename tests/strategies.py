"""Hypothesis strategies: parameters, a loss for them, and values for every argument of `optimize_loss`, good and bad.

A `Configuration` knows which of its arguments are bad, and by what name an error may call each of them.
"""

import functools
import os
import reprlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import optloss

# Hypothesis keeps what it reads in the source; not beside the tests.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f"{tempfile.gettempdir()}/hypothesis")
# Derandomized: the same examples in every run.
PROFILE = settings(database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

NAN, INF = float("nan"), float("inf")
LONG = "x" * 5000  # no message may repeat it


class Configuration(NamedTuple):
    """What a user may write: the arguments of `optimize_loss` and of `init`."""

    settings: dict[str, Any]
    params: Any
    init: dict[str, Any]  # `key` and `model_state`
    checks_loss: bool  # whether `init` is given the loss's argument too
    bad: frozenset[str]  # the arguments that are bad: an error must name one of them
    trained: frozenset[str]  # the names of the parameters that are trained
    tame: bool  # nothing in it can overflow: no step may be skipped

    def __repr__(self) -> str:
        """The fields with each function's place in the file: all lambdas are called alike."""
        return "\n".join(f"    {field}: {shown(value)}" for field, value in self._asdict().items())


def shown(value: Any) -> str:
    """A setting in short."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {shown(inner)}" for key, inner in value.items()) + "}"
    if type(value) in (list, tuple):
        return "[" + ", ".join(map(shown, value[:10])) + "]"
    code = getattr(value, "__code__", None)
    if code:
        return f"{value.__name__} of {code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}"
    array = f"{value.dtype}{list(value.shape)} " if hasattr(value, "dtype") and hasattr(value, "shape") else ""
    return array + reprlib.repr(value)


# Parameters.
class Layer(NamedTuple):
    """Two parameters."""

    kernel: Any
    bias: Any


_SHAPES = st.sampled_from([(), (3,), (2, 3), (0, 2)])
_VALUES = st.sampled_from([0.0, -0.5, 1.0, 3.0])
_WIDE = st.builds(np.full, _SHAPES, _VALUES, st.just(np.float32))
_UNTRAINED = st.builds(np.full, _SHAPES, st.just(1), st.sampled_from([np.int32, np.uint8, np.bool_]))
_PYTHON = st.sampled_from([0.5, 2, np.float32(1.0), None])
_NAMES = st.sampled_from(["w", "b", "kernel", "encoder", "layer_0", "w:0", "ü", ""])


def real_names(params: Any) -> list[str]:
    """The names of the parameters that can be trained."""
    pairs = zip(optloss.parameter_names(params), jax.tree.leaves(params), strict=True)
    return [name for name, leaf in pairs if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)]


def _trees(narrow: Any) -> st.SearchStrategy[Any]:
    other = st.builds(np.full, _SHAPES, _VALUES, st.sampled_from([narrow, np.float64]))
    return st.recursive(
        st.one_of(_WIDE, _WIDE, _WIDE, other, _UNTRAINED, _PYTHON),
        lambda children: st.one_of(
            st.dictionaries(_NAMES, children, min_size=1, max_size=3),
            st.lists(children, min_size=1, max_size=2),
            st.builds(Layer, children, children),
        ),
        min_leaves=2,
        max_leaves=5,
    )


# Not both of the narrow dtypes: some of Optax's optimizers look for the one that all fit in.
PARAMETERS = st.one_of(_trees(ml_dtypes.bfloat16), _trees(np.float16)).filter(real_names)


# Losses: of the parameters, the model state where there is one, and a number.
def squares(params: Any, x: Any) -> jax.Array:
    """`x` times the squared distance of all real parameters from 1."""
    real = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    real = [leaf.astype(jnp.float32) for leaf in real if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return x * sum((jnp.sum(jnp.square(leaf - 1)) for leaf in real), jnp.zeros(()))


def _with_aux(params: Any, x: Any) -> Any:
    return squares(params, x), {"x": x, "n": jnp.int32(1)}


def _with_state(params: Any, model_state: Any, x: Any) -> Any:
    return squares(params, x), jax.tree.map(lambda leaf: leaf + 1, model_state)


def _with_both(params: Any, model_state: Any, x: Any) -> Any:
    return squares(params, x), (jax.tree.map(lambda leaf: leaf + 1, model_state), x)


LOSSES = {(False, False): squares, (True, False): _with_aux, (False, True): _with_state, (True, True): _with_both}
"""By (has_aux, whether there is a model state)."""


# Good values.


GLOBAL_STEPS = [0, 5, np.int64(7), np.array(3, np.uint8), jnp.int32(2), 2**31 - 2, 2**31 - 1]
RATES = [0.1, 0.0, 1, 0.01, np.float32(0.1), np.array(0.1), jnp.float32(0.1), ml_dtypes.bfloat16(0.125)]
FTRLS = ["Ftrl", lambda rate: optloss.ftrl(rate, l1_regularization_strength=0.1, l2_regularization_strength=0.1)]
OUR_OPTIMIZERS = [
    *("Adagrad", "Adam", "Momentum", "RMSProp", "SGD", *FTRLS),
    optloss.adam,
    lambda rate: optloss.momentum(rate, 0.5, use_nesterov=True),
    lambda rate: optloss.rmsprop(rate, momentum=0.5, centered=True),
]
OPTAX_OPTIMIZERS = [
    *("adabelief", "adadelta", "adafactor", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "fromage", "lamb", "lars"),
    *("lbfgs", "lion", "nadam", "nadamw", "novograd", "optimistic_gradient_descent", "polyak_sgd", "radam", "rprop"),
    *("sign_sgd", "yogi"),  # not sm3, which takes no empty arrays
    *(optax.adam, lambda rate: optax.inject_hyperparams(optax.adam)(rate)),
    lambda rate: optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(rate)),
]
TRANSFORMATIONS = [
    optax.sgd(0.1, momentum=0.9),
    optax.adam(optax.linear_schedule(0.1, 0.0, 3)),
    optax.apply_if_finite(optax.adam(0.1), 2),
    optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    optax.masked(optax.adam(0.1), mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 0, tree)),
    optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    optax.contrib.schedule_free_sgd(0.1),
    optax.contrib.prodigy(),
    optax.identity(),
    optax.set_to_zero(),
    optloss.adam(optax.linear_schedule(0.1, 0.0, 3)),
]
RATELESS_OPTIMIZERS = [*TRANSFORMATIONS, lambda: optax.sgd(0.1), lambda: optloss.adam(0.1)]
NOISES = [0.1, 0, 0.0, 1, np.float32(0.01), jnp.float32(0.1), lambda step: 0.1 / (1 + step), lambda step: 1]
FACTORS = [0.5, 1, -1.0, 0.0, np.float32(2.0), np.float64(2.0), jnp.ones(()), lambda step: 0.5**step, lambda step: 2]
CLIPS = [
    *(1.0, 1, 0, 0.1, INF, np.float32(1.0), jnp.float32(0.5), lambda pairs: iter(pairs)),
    lambda pairs: [(jnp.clip(gradient, -1, 1), parameter) for gradient, parameter in pairs],
    optloss.adaptive_clipping_fn(),
    optloss.adaptive_clipping_fn(global_step=True, report_summary=True, static_max_norm=2.0, skip_zero_norm=True),
    *(optloss.clip_by_global_norm(0.5), optax.clip_by_global_norm(1.0), optax.clip(0.1), optax.zero_nans()),
    optax.adaptive_grad_clip(0.01),
]
DECAYS = [
    lambda rate, step: rate,
    lambda rate, step: 0.05,
    lambda rate, step: 1,
    lambda rate, step: optloss.exponential_decay(rate, step, 3, 0.5, staircase=True),
    lambda rate, step: optloss.inverse_time_decay(rate, step, 3, 0.5),
    lambda rate, step: optloss.natural_exp_decay(rate, step, 3, 0.5),
    lambda rate, step: optloss.piecewise_constant(step, [1, 3], [0.1, 0.01, 0.001]),
    lambda rate, step: optloss.polynomial_decay(rate, step, 3, cycle=True),
    lambda rate, step: optloss.cosine_decay(rate, step, 3),
    lambda rate, step: optloss.cosine_decay_restarts(rate, step, 3),
    lambda rate, step: optloss.linear_cosine_decay(rate, step, 3),
    optloss.from_schedule(optax.exponential_decay(1.0, 3, 0.5)),
]
KEYS = [0, 2**64 - 1, np.int32(3), np.array([1, 2], np.uint32), jnp.int32(4)]
MODEL_STATES = [1.0, {"mean": np.ones(2, np.float32), "count": np.int32(0)}, Layer(np.zeros((), np.float16), 2)]
UPDATE_OPS = [[], (), [lambda state, x: state], [lambda state, x: jax.tree.map(lambda leaf: leaf * 2, state)] * 2]
SUMMARIES = [[], (), {"loss"}, ["loss", "loss"], list(optloss.OPTIMIZER_SUMMARIES), ["gradients", "gradient_norm"]]
SPECS = [PartitionSpec(), PartitionSpec("x")]

# Good, but far beyond what training wants: steps may be skipped, and rates be negative, if by rounding alone.
WILD = {
    "learning_rate": [1e30, 3e38, 1e-45],
    "gradient_noise_scale": [1e30, 1e-45, lambda step: -1.0, lambda step: NAN],
    "clip_gradients": [1e-40, 3e38, lambda pairs: [(g * NAN, p) for g, p in pairs]],
    "learning_rate_decay_fn": [
        *(lambda rate, step: NAN, lambda rate, step: -1.0, lambda rate, step: rate / 0),
        lambda rate, step: optloss.noisy_linear_cosine_decay(rate, step, 3, key=jax.random.key(0)),
        optloss.from_schedule(optax.linear_schedule(1.0, 0.0, 3)),
    ],
}
WILD_FACTORS = [1e30, -3e38, 1e-45, lambda step: NAN]


# Bad values.


def raises(*args: Any) -> Any:
    """A function with a mistake in it."""
    return 1 / 0


_BAD_TRANSFORMATIONS = [
    optax.GradientTransformation(init, update)
    for init, update in [
        (lambda p: (), lambda u, s, p=None: None),
        (lambda p: (), lambda u, s, p=None: (jnp.zeros(3), s, 0)),
        (lambda p: (), lambda u, s, p=None: ({"other": jnp.zeros(3)}, s)),
        (lambda p: (), lambda u, s, p=None: (jax.tree.map(lambda g: jnp.zeros((7, *g.shape)), u), s)),
        (lambda p: jnp.zeros(2), lambda u, s, p=None: (u, jnp.zeros(3))),
        (lambda p: jnp.zeros(2), lambda u, s, p=None: (u, (s, s))),
        (raises, lambda u, s, p=None: (u, s)),
        *((lambda p: (), raises), (lambda p: (), lambda u: u), (lambda p: (), None), (3, 4)),
    ]
]
_NO_NUMBERS = [
    *(NAN, -INF, "0.1", LONG, [0.1], list(range(3000)), {}, 1j, True, b"1", object(), raises, np.ones(3000), ()),
    *(np.array("1"), np.float32(NAN), np.complex64(1), np.array([None]), jnp.ones((7, 7)), PartitionSpec()),
]
_NO_FLAGS = [1, None, "yes", LONG, [], 0.0, np.array([True]), np.ones(3000), object()]
_NO_CHOICES = [None, True, "", "Skip", LONG, ["skip"], 3, np.ones(3000), b"skip", object()]
_BAD_FUNCTIONS_OF_STEP = [
    *(len, lambda: 1.0, lambda a, b: 1.0, lambda *, step: 1.0, lambda step: None, lambda step: "a", lambda step: {}),
    *(lambda step: step if step > 3 else 0, lambda step: step > 0, lambda step: 1j, lambda step: jnp.ones(7)),
]

BAD = {
    "loss": [
        *(None, 1.0, "loss", LONG, np.zeros((1, 1)), list(range(3000)), object()),
        # Bad in what they return, which a call alone can show.
        *(lambda p, *a: None, lambda p, *a: 1.0, lambda p, *a: "loss", lambda p, *a: {}, lambda p, *a: True),
        *(lambda p, *a: jnp.ones(2) * squares(p, 1), lambda p, *a: jnp.int32(3), lambda p, *a: squares(p, 1j)),
        *(lambda p, *a: (squares(p, 1),), lambda p, *a: (1.0, {}), lambda p, *a: squares(p, 1) > 0),
        *(lambda p, *a: (jnp.zeros(3), jnp.zeros(3)), lambda p, *a: (squares(p, 1), (p, p, p)), lambda p, *a: object()),
    ],
    "global_step": [
        *(0.0, True, "0", LONG, -1, 2**31, 10**400, np.zeros(1, int), np.zeros(3000, int), [0], {}, 1j, NAN, None),
        *(np.int64(-5), np.array(-5), np.float32(0), jnp.zeros(()), object(), raises),
    ],
    "learning_rate": [*_NO_NUMBERS, None, -0.1, INF, 10**400, 1e39, np.float64(1e300), optax.constant_schedule(0.1)],
    "optimizer": [
        *("adam", "Adamm", "", LONG, "clip", b"Adam", None, 3, NAN, [], {}, object(), list(range(3000)), np.ones(3000)),
        *(raises, len, lambda: optax.sgd(0.1), lambda a, b: optax.sgd(a), lambda rate: None, lambda rate: LONG),
        *(lambda rate: optax.sgd, lambda rate: (raises, raises), lambda rate: rate > 3 and 4, optax.EmptyState()),
        *(optloss.momentum, optax.GradientTransformation, tuple(optax.sgd(0.1)), optloss.optimize_loss),
        *_BAD_TRANSFORMATIONS,
        *(functools.partial(lambda made, rate: made, made) for made in _BAD_TRANSFORMATIONS),
    ],
    "gradient_noise_scale": [*_NO_NUMBERS, *_BAD_FUNCTIONS_OF_STEP, -0.01, INF, 10**400],
    "gradient_multipliers": [  # those that concern no name
        *([1.0], "w", 3, NAN, {3: 1.0}, {None: 1.0}, {(): 1.0}, {"no such": 1.0}, {"no/*": 1.0}, {b"w": 1.0}, object()),
        *(raises, np.ones(3000), {"**": 1.0, "**/**": 1.0}, LONG, {LONG: 1.0}),
    ],
    "clip_gradients": [
        *(*_NO_NUMBERS, -1.0, len, lambda: None, lambda a, b: a, lambda pairs: None, lambda pairs: pairs[:0]),
        *(lambda pairs: 3, lambda pairs: [1], lambda pairs: [*pairs, pairs[0]], lambda pairs: LONG),
        *(lambda pairs: [(None, p) for _, p in pairs], lambda pairs: [(g * 1j, p) for g, p in pairs]),
        *(lambda pairs: [(jnp.ones(7), p) for _, p in pairs], lambda pairs: [(g > 0, p) for g, p in pairs]),
        *(lambda pairs: {1: 2}, lambda pairs: pairs[0][0].item()),
        *(optloss.adaptive_clipping_fn, optloss.clip_by_global_norm, optax.clip_by_global_norm, optax.clip),
        *_BAD_TRANSFORMATIONS,
    ],
    "learning_rate_decay_fn": [
        *(0.5, "cosine", LONG, [], {}, raises, object(), optloss.exponential_decay, optax.constant_schedule(0.1)),
        *(lambda rate: rate, lambda: 0.1, lambda rate, step: None, lambda rate, step: "a", lambda rate, step: 1j),
        *(lambda rate, step: jnp.ones(2), lambda rate, step: rate if step > 3 else 0, lambda rate, step: rate > 0),
        *(lambda rate, step: (rate, step), lambda rate, step: rate.item(), lambda rate, step: LONG),
    ],
    "update_ops": [
        *(len, 3, "op", LONG, {}, [1], [None], [LONG], [len, 3], raises, np.ones(2), {len}, object()),
        *([lambda state, x: None], [lambda state, x: (state, state)], [lambda state, x: raises]),
        [lambda state, x: jax.tree.map(lambda leaf: jnp.zeros((7, *leaf.shape)), state)],
    ],
    "variables": [
        *(3, 0.5, NAN, [], (), {}, [1, 2], {"w": "False"}, ["no such"], "no such", ["no/*"], b"w", False, LONG, [LONG]),
        *(object(), raises, len, lambda: True, lambda a, b: True, lambda name: "False", lambda name: np.ones(2, bool)),
        *([[["w"]]], lambda name: False, lambda name: None, {"no": {"such": True}}, list(range(3000)), [True] * 50),
        *([None], np.ones(3), {"w"}, [{}]),
    ],
    "name": [3, "", b"x", ["a"], {}, NAN, object(), raises, np.ones(3000), list(range(3000))],
    "summaries": [
        *("loss", b"loss", 3, {}, NAN, object(), raises, [None], ["no such"], ["Loss"], [["loss"]], {"loss": True}),
        *(list(range(3000)), np.ones(3000), [np.ones(3)], [3], [b"loss"], LONG, [LONG]),
    ],
    "colocate_gradients_with_ops": _NO_FLAGS,
    "increment_global_step": _NO_FLAGS,
    "has_aux": _NO_FLAGS,
    "reproducible": _NO_FLAGS,
    "axis_name": [{}, [[1]], [{}], set(), np.ones(3), "", 3, 0.5, ["x", 3]],
    "nonfinite": ["ignore", *_NO_CHOICES],
    "noise_generator": ["philox", *_NO_CHOICES],
    "key": [
        *(-1, 2**64, 10**400, 0.5, "seed", True, [0, 1], np.zeros(3, np.uint32), np.zeros(2, np.int32), {}, NAN, None),
        *(np.int64(-1), np.ones((), np.float32), np.zeros(3000, np.uint32), object(), LONG),
    ],
    "param_specs": ["x", LONG, 3, ["x"], {"w": 3}, raises, list(range(3000)), np.ones(3000), ("x", None), object()],
    "params": [
        *("x", None, {}, [], {"w": "x"}, {"w": object()}, raises, [raises], {"a/b": 1.0, "a": {"b": 1.0}}),
        *({"w": 1.0, "z": np.ones(2, np.complex64)}, np.array(["a"]), {"w": np.array([1, None])}, [1.0, b"1"]),
        *({"w": list(LONG)}, LONG, {"w": LONG}),
    ],
    "model_state": ["x", LONG, {"m": object()}, [raises], np.array(["a"]), {"m": b"1"}, {"m": LONG}],
}
"""Values that are bad where the other arguments are as `_NEEDS` has them."""

_NEEDS: dict[str, dict[str, Any]] = {
    "global_step": {"learning_rate": 0.1, "optimizer": "SGD", "learning_rate_decay_fn": DECAYS[0]},
    "learning_rate": {"optimizer": "SGD"},
    "optimizer": {"learning_rate": 0.1},
    "learning_rate_decay_fn": {"learning_rate": 0.1, "optimizer": "SGD", "global_step": 0},
    "key": {"gradient_noise_scale": 0.1},
    "params": {"variables": None, "gradient_multipliers": None},
}

ARGUMENTS = sorted(BAD, key=lambda argument: (-len(BAD[argument]), argument))


def bad_multipliers(names: list[str]) -> list[Any]:
    """Bad multipliers for parameters of these names."""
    name = names[0]
    factors = [*_NO_NUMBERS, *_BAD_FUNCTIONS_OF_STEP, None, INF, 10**400, np.array([1, INF]), np.ones((7, 7, 7))]
    factors += [np.array(["a"]), np.array([1j]), jnp.zeros((0, 7)), np.full((2, 3), NAN)]
    return [*BAD["gradient_multipliers"], [name], name, {name[:-1] + "~": 1.0}, *({name: bad} for bad in factors)]


# Configurations.


@st.composite
def variables_of(draw: Callable[..., Any], params: Any) -> tuple[Any, frozenset[str]]:
    """A good `variables`, and the names that it selects of the parameters that can be trained."""
    names = real_names(params)
    some = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    every = optloss.parameter_names(params)
    flags = jax.tree.unflatten(jax.tree.structure(params), [name in some for name in every])
    of_all = [None, True, "**", ["**", *some]]
    of_some = [some, tuple(some), flags, lambda name: name in some]
    forms = [*((form, names) for form in of_all), *((form, some) for form in of_some), (some[0], some[:1])]
    form, selected = draw(st.sampled_from(forms))
    return form, frozenset(selected)


@st.composite
def multipliers_of(draw: Callable[..., Any], params: Any, factors: list[Any]) -> dict[str, Any]:
    """Good multipliers: of some parameters by name, and perhaps of the others by a pattern."""
    names = optloss.parameter_names(params)
    chosen = draw(st.dictionaries(st.sampled_from(names), st.sampled_from(factors), max_size=3))
    if len(chosen) < len(names) and draw(st.booleans()):
        chosen = {**chosen, "**": draw(st.sampled_from(factors))}
    return chosen


@st.composite
def configurations(draw: Callable[..., Any], most_bad: int = 3, least_bad: int = 0) -> Configuration:
    """Configurations with from `least_bad` to `most_bad` bad arguments; one of four is good where it may be."""
    # 1 first: the first choice is the most frequent one, and what is refused costs least.
    count = draw(st.sampled_from([count for count in (1, 0, 2, 3) if least_bad <= count <= most_bad]))
    bad = draw(st.lists(st.sampled_from(ARGUMENTS), min_size=count, max_size=count, unique=True))
    params = draw(PARAMETERS)
    variables, trained = draw(variables_of(params))
    is_ours, is_wild = not draw(st.booleans()), draw(st.integers(0, 4)) == 4  # the simplest is ours and tame
    chosen, model_state = _good_settings(draw, params, is_ours=is_ours)
    chosen["variables"] = variables
    rate, decay = chosen["learning_rate"], chosen["learning_rate_decay_fn"]
    by_zero = chosen["optimizer"] in FTRLS and decay is not None  # which may go to 0, and Ftrl divides by the rate
    is_tame = is_ours and rate is not None and not is_wild and not by_zero
    if is_wild:
        chosen.update(_wild_setting(draw, chosen, params))
    init = {"key": None, "model_state": model_state}
    (chosen if draw(st.booleans()) else init)["key"] = draw(
        st.sampled_from(KEYS) | st.builds(jax.random.key, st.just(3))
    )
    configuration = Configuration(chosen, params, init, draw(st.booleans()), frozenset(bad), trained, is_tame)
    return functools.reduce(lambda so_far, argument: _spoilt(draw, so_far, argument), sorted(bad), configuration)


def _good_settings(draw: Callable[..., Any], params: Any, *, is_ours: bool) -> tuple[dict[str, Any], Any]:
    """All arguments of `optimize_loss` but `variables`, and a model state where the loss takes one."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    def maybe(*values: Any) -> Any:
        return one_of(*values) if draw(st.booleans()) else None

    has_aux, with_state = one_of(False, True), one_of(False, True)
    rate, decay = one_of(*RATES, None), maybe(*DECAYS)
    ours = [optimizer for optimizer in OUR_OPTIMIZERS if rate or optimizer not in FTRLS]
    optimizers = ours if is_ours else [*OPTAX_OPTIMIZERS, *TRANSFORMATIONS]
    chosen = {
        "loss": LOSSES[has_aux, with_state],
        "global_step": one_of(*GLOBAL_STEPS, *([] if decay else [None])),
        "learning_rate": rate,
        "optimizer": one_of(*(RATELESS_OPTIMIZERS if rate is None else optimizers)),
        "gradient_noise_scale": maybe(*NOISES),
        "gradient_multipliers": draw(st.none() | multipliers_of(params, FACTORS)),
        "clip_gradients": maybe(*CLIPS),
        "learning_rate_decay_fn": decay,
        "update_ops": maybe(*UPDATE_OPS) if with_state else one_of(None, []),
        "name": one_of(None, "d", "a/b", "ü n"),
        "summaries": maybe(*SUMMARIES),
        "colocate_gradients_with_ops": one_of(False, True),
        "increment_global_step": one_of(True, False),
        "has_aux": has_aux,
        "axis_name": one_of(None, (), []),
        "nonfinite": one_of("skip", "skip", "apply"),
        "key": None,
        "noise_generator": one_of("mixer", "threefry"),
        "param_specs": maybe(*SPECS),
        "reproducible": one_of(False, True),
    }
    return chosen, one_of(*MODEL_STATES) if with_state else None


def _wild_setting(draw: Callable[..., Any], chosen: dict[str, Any], params: Any) -> dict[str, Any]:
    """One setting after which steps may be skipped."""
    argument = draw(st.sampled_from([*WILD, "gradient_multipliers"]))
    if argument == "gradient_multipliers":
        return {argument: draw(multipliers_of(params, [*FACTORS, *WILD_FACTORS]))}
    if argument.startswith("learning_rate") and chosen[argument] is None:  # other arguments hang on that
        return {}
    return {argument: draw(st.sampled_from(WILD[argument]))}


def _spoilt(draw: Callable[..., Any], configuration: Configuration, argument: str) -> Configuration:
    """The configuration with one bad argument."""
    chosen, init, params = dict(configuration.settings), dict(configuration.init), configuration.params
    of_names = bad_multipliers(optloss.parameter_names(params)) if argument == "gradient_multipliers" else None
    value = draw(st.sampled_from(of_names or BAD[argument]))
    if argument == "params":
        params = value
    elif argument == "model_state" or (argument == "key" and draw(st.booleans())):
        init[argument] = value
    else:
        chosen[argument] = value
    if argument == "key" and value is None:
        chosen["key"] = init["key"] = None
    needs = _NEEDS.get(argument, {})
    chosen.update({other: needed for other, needed in needs.items() if other not in configuration.bad})
    return configuration._replace(settings=chosen, params=params, init=init)
