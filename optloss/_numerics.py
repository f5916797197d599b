"""The norm that every stage shares, and the dtype in which a leaf is computed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["compute_dtype", "global_norm", "leaf_norms", "scale_tree", "sqrt"]


def global_norm(tree: Any) -> jax.Array:
    """Returns the L2 norm over all leaves of a tree, accumulated in float32 or better.

        norm = sqrt(sum_i sum(leaf_i ** 2))

    Right to 3 ulp from 1e-30 to 1e30: where the plain sum of squares overflows or vanishes, and only there, the
    leaves are first scaled by a power of two.

    Args:
        tree: Any pytree of real arrays.

    Returns:
        A scalar; float32, or float64 where a leaf is float64.

    Example:
        >>> optloss.global_norm({"a": jnp.array([3.0]), "b": jnp.array(4.0)})
        Array(5., dtype=float32)

    Unlike `optax.tree.norm` and `tf.global_norm`, bfloat16 and float16 leaves do not lose digits, overflow from 256
    on, or read as 0 below 1e-4.
    """
    return leaf_norms(tree)[1]


def leaf_norms(tree: Any, rescale: Callable[[Any], Any] | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the norm of each leaf, in one vector, and the norm of all, from one pass over the leaves.

    With `rescale` they are the norms of `rescale(tree)`, which is not stored.
    """
    leaves = _leaves(rescale, tree)
    dtype = functools.reduce(compute_dtype, (leaf.dtype for leaf in leaves), jnp.dtype(jnp.float32))
    if not leaves:
        return jnp.zeros((0,), dtype), jnp.zeros((), dtype)
    squares = _sums_of_squares(leaves, jnp.ones((), dtype))
    total = jnp.sum(squares)
    # A square that vanishes is below `tiny`; together they must stay below half an ulp of the sum.
    count = sum(leaf.size for leaf in leaves)
    smallest = 2 * count * jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps
    plain = (total > smallest) & (total < jnp.inf)
    # Two branches: fused into one, each leaf's sum would work out the scale anew, and compiling takes n**2. They
    # get the tree as it is, since what a branch is given has to be stored.
    scale = jax.lax.cond(plain, _no_scale, _named(_scale_to_one, rescale), tree, total)
    norms: tuple[jax.Array, jax.Array] = jax.lax.cond(
        plain, _plain_norms, _named(_scaled_norms, rescale), tree, squares, scale
    )
    return norms


def _named(function: Callable[..., Any], rescale: Callable[[Any], Any] | None) -> Callable[..., Any]:
    """The function with its `rescale`; the same object where there is none, so that eager loops do not recompile it."""
    return function if rescale is None else functools.partial(function, rescale=rescale)


def _leaves(rescale: Callable[[Any], Any] | None, tree: Any) -> list[jax.Array]:
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree if rescale is None else rescale(tree))]


def _no_scale(tree: Any, total: jax.Array) -> jax.Array:
    del tree
    return jnp.ones_like(total)


def _scale_to_one(tree: Any, total: jax.Array, rescale: Callable[[Any], Any] | None = None) -> jax.Array:
    """The power of two that brings the largest element to about 1, so that squares can neither overflow nor vanish."""
    leaves = _leaves(rescale, tree)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(total.dtype) for x in leaves]))
    _, exponent = jnp.frexp(jax.lax.stop_gradient(largest))
    reach = jnp.finfo(total.dtype).maxexp - 3  # a power beyond it would itself be flushed to zero
    return jnp.ldexp(jnp.ones_like(total), jnp.clip(-exponent, -reach, reach))


def _plain_norms(tree: Any, squares: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    del tree, scale
    return sqrt(squares), sqrt(jnp.sum(squares))


def _scaled_norms(
    tree: Any, squares: jax.Array, scale: jax.Array, rescale: Callable[[Any], Any] | None = None
) -> tuple[jax.Array, jax.Array]:
    # The barrier hides constant leaves, whose squares the compiler would otherwise work out before they are scaled.
    squares = _sums_of_squares(_leaves(rescale, jax.lax.optimization_barrier(tree)), scale)
    return sqrt(squares) / scale, sqrt(jnp.sum(squares)) / scale


def _sums_of_squares(leaves: list[jax.Array], scale: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.square(leaf.astype(scale.dtype) * scale)) for leaf in leaves])


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """Square root whose derivative at 0 is 0, so that a gradient taken through a step is not NaN there."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    root = sqrt(x)
    return root, jnp.where(x > 0, tangent / jnp.where(x > 0, 2 * root, 1), 0)


def scale_tree(tree: Any, factor: jax.Array) -> Any:
    """Multiplies each leaf by one scalar, in float32 or better, and keeps the leaf's dtype."""

    def scale(leaf: jax.Array) -> jax.Array:
        dtype = compute_dtype(leaf.dtype)
        return (leaf.astype(dtype) * factor.astype(dtype)).astype(leaf.dtype)

    return jax.tree.map(scale, tree)


def compute_dtype(*dtypes: Any) -> np.dtype:
    """The dtype in which leaves of `dtypes` are computed together: float64 where one is that, else float32."""
    wide = any(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits > 32 for dtype in dtypes)
    return np.dtype(np.float64 if wide else np.float32)
