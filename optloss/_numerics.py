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
    is_plain = (total > smallest) & (total < jnp.inf)
    # A power of two, exact; it takes numbers whose squares lie beyond one end of the dtype to the middle.
    shift = 0.75 * jnp.finfo(dtype).maxexp
    scale = jnp.where(is_plain, 1, jnp.where(total > 1, 2.0**-shift, 2.0**shift)).astype(dtype)
    # Named functions, so that a loop without jit does not compile the branches at every step.
    squares, total = jax.lax.cond(is_plain, _as_they_are, _scaled_squares, squares, total, leaves, scalars, scale)
    return [sqrt(square) / scale for square in squares], sqrt(total) / scale


def _apart(leaf: jax.Array, factor: jax.Array | None, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """A leaf and the scalar to be multiplied in later; a factor that is an array is multiplied in here."""
    if factor is not None and factor.ndim:
        return leaf.astype(factor.dtype) * factor, None
    return leaf, None if factor is None else factor.astype(dtype)


def _sum_of_squares(leaf: jax.Array, scalar: jax.Array | None, dtype: Any) -> jax.Array:
    # Behind the barrier, the squares are not those that an optimizer takes, which the compiler would store for both.
    squares = jnp.sum(jnp.square(jax.lax.optimization_barrier(leaf).astype(dtype)))
    return squares if scalar is None else squares * jnp.square(scalar)


def _as_they_are(
    squares: list[jax.Array],
    total: jax.Array,
    leaves: list[jax.Array],
    scalars: list[jax.Array | None],
    scale: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    del leaves, scalars, scale
    return squares, total


def _scaled_squares(
    squares: list[jax.Array],
    total: jax.Array,
    leaves: list[jax.Array],
    scalars: list[jax.Array | None],
    scale: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """The sums of squares times `scale ** 2`, where those without it would overflow or vanish."""
    scales = [scale if scalar is None else scale * scalar for scalar in scalars]
    # The barrier hides constant leaves, whose squares the compiler would otherwise work out before they are scaled, and
    # keeps the scales apart: the compiler would store one spread over the shape of all leaves alike.
    pairs = [jax.lax.optimization_barrier(pair) for pair in zip(leaves, scales, strict=True)]
    squares = [jnp.sum(jnp.square(leaf.astype(total.dtype) * scale)) for leaf, scale in pairs]
    return squares, jnp.sum(jnp.stack(squares))


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
