"""The norm that every stage shares, and the dtype in which a leaf is computed."""

import functools
from collections.abc import Sequence
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


def leaf_norms(tree: Any, factors: Sequence[jax.Array | None] | None = None) -> tuple[list[jax.Array], jax.Array]:
    """Returns the norm of each leaf and the norm of all, from one pass over the leaves.

    With `factors` they are the norms of the leaves times their factors, which are not stored.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = functools.reduce(compute_dtype, (leaf.dtype for leaf in leaves), jnp.dtype(jnp.float32))
    if not leaves:
        return [], jnp.zeros((), dtype)
    rows = zip(leaves, factors or [None] * len(leaves), strict=True)
    apart = [_apart(leaf, factor, dtype) for leaf, factor in rows]
    leaves, scalars = [leaf for leaf, _ in apart], [scalar for _, scalar in apart]
    # One number for each leaf, not one vector: to take that apart, each leaf would need a kernel of its own.
    squares = [_sum_of_squares(leaf, scalar, dtype) for leaf, scalar in apart]
    total = jnp.sum(jnp.stack(squares))
    # A square that vanishes is below `tiny`; together they must stay below half an ulp of the sum.
    plain_size = sum(leaf.size for leaf, scalar in apart if scalar is None)
    sizes = [leaf.size * jnp.square(scalar) for leaf, scalar in apart if scalar is not None]
    smallest = jnp.sum(jnp.stack([jnp.asarray(plain_size, dtype), *sizes]))
    smallest *= 2 * jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps
    plain = (total > smallest) & (total < jnp.inf)
    # Named functions, so that a loop without jit does not compile the branches at every step.
    norms: tuple[list[jax.Array], jax.Array] = jax.lax.cond(
        plain, _plain_norms, _scaled_norms, leaves, scalars, squares, total
    )
    return norms


def _apart(leaf: jax.Array, factor: jax.Array | None, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """A leaf and the scalar to be multiplied in later; a factor that is an array is multiplied in here."""
    if factor is not None and factor.ndim:
        return leaf.astype(factor.dtype) * factor, None
    return leaf, None if factor is None else factor.astype(dtype)


def _sum_of_squares(leaf: jax.Array, scalar: jax.Array | None, dtype: Any) -> jax.Array:
    # Behind the barrier, the squares are not those that an optimizer takes, which the compiler would store for both.
    squares = jnp.sum(jnp.square(jax.lax.optimization_barrier(leaf).astype(dtype)))
    return squares if scalar is None else squares * jnp.square(scalar)


def _plain_norms(
    leaves: list[jax.Array], scalars: list[jax.Array | None], squares: list[jax.Array], total: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    del leaves, scalars
    return [sqrt(square) for square in squares], sqrt(total)


def _scaled_norms(
    leaves: list[jax.Array], scalars: list[jax.Array | None], squares: list[jax.Array], total: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    del squares
    # The barrier hides constant leaves, whose squares the compiler would otherwise work out before they are scaled.
    norms = [_scaled_norm(leaf.astype(total.dtype)) for leaf in jax.lax.optimization_barrier(leaves)]
    norms = [n if scalar is None else n * jnp.abs(scalar) for n, scalar in zip(norms, scalars, strict=True)]
    return norms, _scaled_norm(jnp.stack(norms))


@jax.jit
def _scaled_norm(x: jax.Array) -> jax.Array:
    """The norm by way of a power of two that brings the largest element near 1: no square overflows or vanishes."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    # A float's exponent is a field of bits: subtracted from the highest one, it is that of the inverse.
    integers = {4: jnp.int32, 8: jnp.int64}[x.dtype.itemsize]
    infinity, smallest = (np.asarray(value, x.dtype).view(integers) for value in (np.inf, jnp.finfo(x.dtype).tiny))
    exponent = jax.lax.bitcast_convert_type(largest, integers) & infinity
    scale = jax.lax.bitcast_convert_type(jnp.maximum(infinity - smallest - exponent, smallest), x.dtype)
    return sqrt(jnp.sum(jnp.square(x * scale))) / scale


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
