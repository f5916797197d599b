"""The forms in which an optimizer may be given: a name, a function of the rate, a transformation."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from optloss._check import check_arity, describe, did_you_mean, named_call, shown
from optloss._ftrl import ftrl
from optloss._optimizers import adagrad, adam, momentum, rmsprop, sgd
from optloss._rule import LearningRate

__all__ = ["OPTIMIZER_CLS_NAMES", "OptimizerFunction", "optimizer_function"]

OptimizerFunction: TypeAlias = Callable[[jax.Array | None], optax.GradientTransformationExtraArgs]

OPTIMIZER_CLS_NAMES: Mapping[str, Callable[[LearningRate], optax.GradientTransformation]] = MappingProxyType(
    {
        "Adagrad": adagrad,
        "Adam": adam,
        "Ftrl": ftrl,
        "Momentum": lambda learning_rate: momentum(learning_rate, momentum=0.9),
        "RMSProp": rmsprop,
        "SGD": sgd,
    }
)
"""The names that `optimizer` takes, each with its function of the learning rate."""

# Names of Optax whose function can be called with the rate alone. Those that differ from one of ours by their case are
# not among them: other numbers for another case would be a trap.
_OPTAX_ALIASES = (
    *("adabelief", "adadelta", "adafactor", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "fromage", "lamb", "lars"),
    *("lbfgs", "lion", "nadam", "nadamw", "novograd", "optimistic_gradient_descent", "polyak_sgd", "radam", "rprop"),
    *("sign_sgd", "sm3", "yogi"),
)


def optimizer_function(optimizer: Any, learning_rate: ArrayLike | None) -> OptimizerFunction:
    """Returns the function of the rate that the argument `optimizer` of `optimize_loss` stands for.

    Raises:
        ValueError: It is an unknown name, needs a rate that is None, or is no optimizer in any form.
        TypeError: It is a function of other arguments.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return lambda rate: optax.with_extra_args_support(optimizer)
    if isinstance(optimizer, str):
        builder = _named(optimizer)
        if learning_rate is None:
            raise ValueError(
                f"learning_rate: Learning rate is None, but should be specified if optimizer is string ({optimizer})."
            )
        if optimizer in OPTIMIZER_CLS_NAMES and isinstance(learning_rate, float):
            builder(learning_rate)  # Ftrl raises for 0
        return lambda rate: optax.with_extra_args_support(builder(rate))
    if not callable(optimizer):
        raise ValueError(
            f"optimizer: Unrecognized optimizer: got {shown(optimizer)} of type {type(optimizer).__name__}; one of "
            f"{', '.join(OPTIMIZER_CLS_NAMES)}, an Optax name such as 'adamw', a GradientTransformation, or a "
            "function of "
            "the learning rate (of nothing where that is None) would do."
        )
    if learning_rate is None and optimizer in OPTIMIZER_CLS_NAMES.values():
        raise ValueError(
            "learning_rate: Learning rate is None, but should be specified if optimizer is class "
            f"({describe(optimizer)})."
        )
    check_arity("optimizer", optimizer, [] if learning_rate is None else ["learning_rate"])

    def call(rate: jax.Array | None) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(optimizer() if rate is None else optimizer(rate))

    _check_result(optimizer, learning_rate)
    return call


def _check_result(optimizer: Callable[..., Any], learning_rate: ArrayLike | None) -> None:
    """Raises where a user's function of the rate, called on an abstract one, returns no transformation."""
    made: list[Any] = []

    def traced(*rate: jax.Array) -> None:
        made.append(optimizer(*rate))

    rate = [] if learning_rate is None else [jax.ShapeDtypeStruct((), np.float32)]
    named_call("optimizer", functools.partial(jax.eval_shape, traced), *rate, name=describe(optimizer))
    if not isinstance(made[0], optax.GradientTransformation):
        raise ValueError(
            f"optimizer: Unrecognized optimizer: {describe(optimizer)} returned {shown(made[0])}; a function should "
            "return a "
            "GradientTransformation."
        )


def _named(name: str) -> Callable[[Any], optax.GradientTransformation]:
    if name in OPTIMIZER_CLS_NAMES:
        return OPTIMIZER_CLS_NAMES[name]
    if name in _OPTAX_ALIASES:
        function: Callable[[Any], optax.GradientTransformation] = getattr(optax, name)
        return function
    known = [*OPTIMIZER_CLS_NAMES, *_OPTAX_ALIASES]
    optaxs = (
        f" Optax's own is optimizer=optax.{name}." if name.casefold() in map(str.casefold, OPTIMIZER_CLS_NAMES) else ""
    )
    raise ValueError(
        f"optimizer: Optimizer name should be one of [{', '.join(OPTIMIZER_CLS_NAMES)}] or of Optax's "
        f"[{', '.join(_OPTAX_ALIASES)}], you provided {shown(name)}.{did_you_mean(name, known)}{optaxs}"
    )
