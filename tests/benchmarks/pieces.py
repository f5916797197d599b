"""Pieces of the step alone: noise and histograms, by optloss and by JAX."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax_contenders import NOISE, add_noise, carried, zeros
from workers import Contender

import optloss

__all__ = ["jax_histogram", "jax_noise", "optax_noise", "optloss_histogram", "optloss_noise", "read"]


def optloss_noise(shapes: Sequence[tuple[int, ...]]) -> Contender:
    """Noise by the stage that stands alone, in seconds a number."""
    return _noise(optloss.add_gradient_noise(NOISE, key=0), shapes)


def optax_noise(shapes: Sequence[tuple[int, ...]]) -> Contender:
    """Noise by Optax, which is not truncated."""
    return _noise(optax.add_noise(NOISE**2, 0.0, jax.random.key(0)), shapes)


def jax_noise(shapes: Sequence[tuple[int, ...]]) -> Contender:
    """Noise by `jax.random.truncated_normal`."""
    return _noise(add_noise(NOISE, 0), shapes)


def optloss_histogram(shape: tuple[int, ...]) -> Contender:
    """The histogram of TensorFlow's buckets."""
    return _figure(optloss.histogram, shape)


def jax_histogram(shape: tuple[int, ...], buckets: int) -> Contender:
    """As many buckets, evenly spaced."""
    return _figure(lambda values: jnp.histogram(values, buckets), shape)


def read(shape: tuple[int, ...]) -> Contender:
    """One read of the values."""
    return _figure(jnp.sum, shape)


def _noise(transformation: optax.GradientTransformation, shapes: Sequence[tuple[int, ...]]) -> Contender:
    gradients = zeros(shapes)
    state = transformation.init(gradients)

    def step(carry: tuple[Any, Any]) -> tuple[tuple[Any, Any], None]:
        return transformation.update(*carry), None

    return carried(step, (gradients, state), repeats=sum(math.prod(shape) for shape in shapes))


def _figure(function: Callable[[jax.Array], Any], shape: tuple[int, ...]) -> Contender:
    values = jax.random.normal(jax.random.key(0), shape)
    compiled = jax.jit(function)
    return Contender(lambda: jax.block_until_ready(compiled(values)))
