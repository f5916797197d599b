"""The norm that every stage shares, and the dtype in which a leaf is computed."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optloss._axes import AxisNames, add_up, parts, varying_axes

__all__ = ["compute_dtype", "global_norm", "leaf_norms", "round_apart", "scale_tree", "sqrt"]


def global_norm(tree: Any, *, exact: bool = False) -> jax.Array:
    """Returns the L2 norm over all leaves of a tree, accumulated in float32 or better.

        norm = sqrt(sum_i sum(leaf_i ** 2))

    Right to 3 ulp from 1e-30 to 1e30: where the plain sum of squares overflows or vanishes, and only there, the
    leaves are first scaled by a power of two. Inside `shard_map` it is the norm of the whole arrays, of which each
    device has a part.

    Args:
        tree: Any pytree of real arrays.
        exact: Whether to accumulate in float64: right to half an ulp, and so the same bits however the leaves lie on
            devices, but for a chance of about 1e-8. Up to twice the time on a CPU. Float64 leaves have no wider dtype;
            for them it changes nothing.

    Returns:
        A scalar; float32, or float64 where a leaf is float64.

    Example:
        >>> optloss.global_norm({"a": jnp.array([3.0]), "b": jnp.array(4.0)})
        Array(5., dtype=float32)

    Unlike `optax.tree.norm` and `tf.global_norm`, bfloat16 and float16 leaves do not lose digits, overflow from 256
    on, or read as 0 below 1e-4.
    """
    return leaf_norms(tree, exact=exact)[1]


def leaf_norms(
    tree: Any,
    factors: Sequence[jax.Array | None] | None = None,
    along: Sequence[AxisNames] | None = None,
    *,
    exact: bool = False,
) -> tuple[list[jax.Array], jax.Array]:
    """Returns the norm of each leaf and the norm of all, from one pass over the leaves.

    With `factors` they are the norms of the leaves times their factors, which are not stored. `along` are the axes
    along which each leaf is cut; without it, those that its type names.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = functools.reduce(compute_dtype, (leaf.dtype for leaf in leaves), jnp.dtype(jnp.float32))
    if not leaves:
        return [], jnp.zeros((), dtype)
    rows = zip(leaves, factors or [None] * len(leaves), strict=True)
    apart = [_apart(leaf, factor, dtype) for leaf, factor in rows]
    along = [tuple(sorted(varying_axes(leaf), key=str)) for leaf in leaves] if along is None else along
    return _exact_norms(apart, along) if exact and dtype == np.float32 else _ranged_norms(apart, along, dtype)


_Apart = tuple[jax.Array, jax.Array | None]  # a leaf, and its factor where that is a scalar


def _exact_norms(apart: list[_Apart], along: Sequence[AxisNames]) -> tuple[list[jax.Array], jax.Array]:
    """In float64 no square of a float32 overflows or vanishes."""
    with x64():
        squares = add_up([_sum_of_squares(leaf, scalar, np.float64) for leaf, scalar in apart], along)
        total = jnp.sum(jnp.stack(squares))
        return [sqrt(square).astype(np.float32) for square in squares], sqrt(total).astype(np.float32)


def _ranged_norms(apart: list[_Apart], along: Sequence[AxisNames], dtype: Any) -> tuple[list[jax.Array], jax.Array]:
    """In the leaves' own dtype; a second time, scaled, where the sum of squares is beyond its range."""
    leaves, scalars = [leaf for leaf, _ in apart], [scalar for _, scalar in apart]
    # One number for each leaf, not one vector: to take that apart, each leaf would need a kernel of its own.
    squares = add_up([_sum_of_squares(leaf, scalar, dtype) for leaf, scalar in apart], along)
    total = jnp.sum(jnp.stack(squares))
    # A square that vanishes is below `tiny`; together they must stay below half an ulp of the sum.
    sizes = [leaf.size * parts(own) for leaf, own in zip(leaves, along, strict=True)]
    plain_size = sum(size for size, scalar in zip(sizes, scalars, strict=True) if scalar is None)
    scaled_sizes = [
        size * jnp.square(scalar) for size, scalar in zip(sizes, scalars, strict=True) if scalar is not None
    ]
    smallest = jnp.sum(jnp.stack([jnp.asarray(plain_size, dtype), *scaled_sizes]))
    smallest *= 2 * jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps
    is_plain = (total > smallest) & (total < jnp.inf)
    # A power of two, exact; it takes numbers whose squares lie beyond one end of the dtype to the middle.
    shift = 0.75 * jnp.finfo(dtype).maxexp
    scale = jnp.where(is_plain, 1, jnp.where(total > 1, 2.0**-shift, 2.0**shift)).astype(dtype)
    # Named functions, so that a loop without jit does not compile the branches at every step.
    scaled = functools.partial(_scaled_squares, along=along) if any(along) else _scaled_squares
    squares, total = jax.lax.cond(is_plain, _as_they_are, scaled, squares, total, leaves, scalars, scale)
    return [sqrt(square) / scale for square in squares], sqrt(total) / scale


def _apart(leaf: jax.Array, factor: jax.Array | None, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """A leaf and the scalar to be multiplied in later; a factor that is an array is multiplied in here."""
    if factor is not None and factor.ndim:
        return leaf.astype(factor.dtype) * factor, None
    return leaf, None if factor is None else factor.astype(dtype)


def _sum_of_squares(leaf: jax.Array, scalar: jax.Array | None, dtype: Any) -> jax.Array:
    # Behind the barrier, the squares are not those that an optimizer takes, which the compiler would store for both.
    squares = jnp.sum(jnp.square(jax.lax.optimization_barrier(leaf).astype(dtype)))
    return squares if scalar is None else squares * jnp.square(scalar.astype(dtype))


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
    along: Sequence[AxisNames] = (),
) -> tuple[list[jax.Array], jax.Array]:
    """The sums of squares times `scale ** 2`, where those without it would overflow or vanish."""
    scales = [scale if scalar is None else scale * scalar for scalar in scalars]
    # The barrier hides constant leaves, whose squares the compiler would otherwise work out before they are scaled, and
    # keeps the scales apart: the compiler would store one spread over the shape of all leaves alike.
    pairs = [jax.lax.optimization_barrier(pair) for pair in zip(leaves, scales, strict=True)]
    squares = [jnp.sum(jnp.square(leaf.astype(total.dtype) * scale)) for leaf, scale in pairs]
    squares = add_up(squares, along) if along else squares
    return squares, jnp.sum(jnp.stack(squares))


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """Square root whose derivative at 0 is 0, so that a gradient taken through a step is not NaN there."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    with x64() if x.dtype == np.float64 else contextlib.nullcontext():
        root = sqrt(x)
        return root, jnp.where(x > 0, tangent / jnp.where(x > 0, 2 * root, 1), 0)


def x64() -> Any:
    """Float64 in what is traced inside of it, whatever `jax_enable_x64` says."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64(True)  # type: ignore[attr-defined]  # it was there before JAX 0.8


def scale_tree(tree: Any, factor: jax.Array) -> Any:
    """Multiplies each leaf by one scalar, in float32 or better, and keeps the leaf's dtype."""

    def scale(leaf: jax.Array) -> jax.Array:
        dtype = compute_dtype(leaf.dtype)
        return (leaf.astype(dtype) * factor.astype(dtype)).astype(leaf.dtype)

    return jax.tree.map(scale, tree)


def round_apart(tree: Any, count: jax.Array) -> Any:
    """The tree, with each product in it rounded before it is used; `count` is any int32 >= 0.

    A compiler may round a product and the sum that follows as one, and does so in some kernels and not in others.
    """
    zero = count >> 31  # no compiler can know that

    def round_leaf(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"int{8 * leaf.dtype.itemsize}"))
        return jax.lax.bitcast_convert_type(bits + zero.astype(bits.dtype), leaf.dtype)

    return jax.tree.map(round_leaf, tree)


def compute_dtype(*dtypes: Any) -> np.dtype:
    """The dtype in which leaves of `dtypes` are computed together: float64 where one is that, else float32."""
    wide = any(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits > 32 for dtype in dtypes)
    return np.dtype(np.float64 if wide else np.float32)
