"""TensorFlow 1's `optimize_loss` for JAX and Optax: the whole training update of a loss in one call.

    loss ─ value_and_grad, with respect to `variables` alone
      │
    gradients ─ mean over `axis_name` ─ noise ─ multipliers ─┬─ clip ─┬─ optimizer(decayed rate) ─ apply ─ step + 1
                                                             │        │
                                                 norm before ┘        └ norm after      = summaries

`optimize_loss` is the call, and makes a `TrainOp`; its steps take a `TrainState` and give a `TrainOutput`.

    the pipeline, for loops that have gradients    transformation
    each stage, for any `optax.chain`              add_gradient_noise, multiply_gradients, clip_by_global_norm,
                                                   adaptive_clipping_fn, scale_by_decayed_learning_rate
    optimizers, to TF1's numbers                   sgd, momentum, adagrad, adam, rmsprop, ftrl
    decays: (learning_rate, global_step) -> rate   exponential_decay, natural_exp_decay, inverse_time_decay,
                                                   piecewise_constant, polynomial_decay, cosine_decay,
                                                   cosine_decay_restarts, linear_cosine_decay,
                                                   noisy_linear_cosine_decay; from_schedule
    seeing and keeping                             train.explain, global_norm, histogram, parameter_names,
                                                   checksums, restore

`from optloss import tensorboard, pictures` for logs, progress bars and pictures of a run.
"""

from optloss._checksums import checksums
from optloss._clipping import AdaptiveClippingState, adaptive_clipping_fn, clip_by_global_norm
from optloss._decay import (
    exponential_decay,
    inverse_time_decay,
    natural_exp_decay,
    piecewise_constant,
    polynomial_decay,
)
from optloss._decay_cosine import (
    cosine_decay,
    cosine_decay_restarts,
    linear_cosine_decay,
    noisy_linear_cosine_decay,
)
from optloss._explain import Explanation
from optloss._ftrl import FtrlState, ftrl
from optloss._histogram import Histogram, histogram
from optloss._learning_rate import DecayedLearningRateState, from_schedule, scale_by_decayed_learning_rate
from optloss._multipliers import MultiplyGradientsState, multiply_gradients
from optloss._names import parameter_names
from optloss._noise import GradientNoiseState, add_gradient_noise
from optloss._numerics import global_norm
from optloss._optimize_loss import TrainOp, TrainOutput, optimize_loss
from optloss._optimizer_forms import OPTIMIZER_CLS_NAMES
from optloss._optimizers import (
    AdagradState,
    AdamState,
    MomentumState,
    RMSPropState,
    adagrad,
    adam,
    momentum,
    rmsprop,
    sgd,
)
from optloss._pipeline import OptState
from optloss._restore import restore
from optloss._summaries import OPTIMIZER_SUMMARIES
from optloss._train_state import TrainState
from optloss._transformation import TransformationState, transformation

__all__ = [
    "OPTIMIZER_CLS_NAMES",
    "OPTIMIZER_SUMMARIES",
    "AdagradState",
    "AdamState",
    "AdaptiveClippingState",
    "DecayedLearningRateState",
    "Explanation",
    "FtrlState",
    "GradientNoiseState",
    "Histogram",
    "MomentumState",
    "MultiplyGradientsState",
    "OptState",
    "RMSPropState",
    "TrainOp",
    "TrainOutput",
    "TrainState",
    "TransformationState",
    "adagrad",
    "adam",
    "adaptive_clipping_fn",
    "add_gradient_noise",
    "checksums",
    "clip_by_global_norm",
    "cosine_decay",
    "cosine_decay_restarts",
    "exponential_decay",
    "from_schedule",
    "ftrl",
    "global_norm",
    "histogram",
    "inverse_time_decay",
    "linear_cosine_decay",
    "momentum",
    "multiply_gradients",
    "natural_exp_decay",
    "noisy_linear_cosine_decay",
    "optimize_loss",
    "parameter_names",
    "piecewise_constant",
    "polynomial_decay",
    "restore",
    "rmsprop",
    "scale_by_decayed_learning_rate",
    "sgd",
    "transformation",
]
