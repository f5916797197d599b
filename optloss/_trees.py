"""Trees of parameters and of state: parts of them, where they lie, what of two is kept, and whether it is finite."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optloss._axes import vary, varying_axes
from optloss._check import named_call, shown

__all__ = [
    "choose",
    "colocate",
    "is_inexact",
    "keep",
    "keep_types",
    "merge",
    "shardings_of",
    "still_finite",
    "strong_array",
]


def keep(tree: Any, selected: Sequence[bool]) -> Any:
    """The tree with None in place of the leaves that are not selected."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [leaf if chosen else None for leaf, chosen in zip(leaves, selected, strict=True)]
    )


def merge(kept: Any, tree: Any, selected: Sequence[bool]) -> Any:
    """`tree` with the leaves of `kept` in the places that are selected."""
    leaves, treedef = jax.tree.flatten(tree)
    new = iter(jax.tree.leaves(kept))
    return jax.tree.unflatten(
        treedef, [next(new) if chosen else leaf for leaf, chosen in zip(leaves, selected, strict=True)]
    )


def choose(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the step is finite, else `old` to the bit."""
    return jax.tree.map(lambda a, b: b if a is b else jnp.where(finite, a, b), new, old)


def shardings_of(params: Any) -> tuple[jax.sharding.Sharding | None, ...]:
    """How each parameter lies on its mesh; None where it is traced, or where its type says it and gradients follow."""

    def sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.explicit_axes:
            return None
        return jax.sharding.NamedSharding(sharding.mesh, _shortest(sharding), memory_kind=sharding.memory_kind)

    return tuple(sharding_of(leaf) for leaf in jax.tree.leaves(params))


def _shortest(sharding: jax.sharding.NamedSharding) -> jax.sharding.PartitionSpec:
    """The spec as programs give it back; another spelling of it would be compiled for once more."""
    entries: list[Any] = []
    for entry in sharding.spec:
        axes = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        axes = tuple(axis for axis in axes if sharding.mesh.shape[axis] > 1)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    while entries and entries[-1] is None:
        entries.pop()
    return jax.sharding.PartitionSpec(*entries)


def colocate(gradients: Any, shardings: Sequence[jax.sharding.Sharding | None]) -> Any:
    """Holds each gradient to the sharding of its parameter."""
    leaves, treedef = jax.tree.flatten(gradients)
    held = [
        leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    return jax.tree.unflatten(treedef, held)


def still_finite(finite: jax.Array, new: Any, old: Any) -> jax.Array:
    """Whether `finite` holds and no element of `new` is NaN or infinite that was not so in `old`.

    Some states begin with infinity, as the best loss of a plateau.
    """
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    changed = [(a, b) for a, b in pairs if a is not b and is_inexact(a)]
    # A branch: as plain operations the flags of all leaves would be fused into every use, and compiling takes n**2.
    finite = vary(finite, sorted({axis for a, _ in changed for axis in varying_axes(a)}, key=str))
    still: jax.Array = jax.lax.cond(finite, _all_still_finite, lambda finite, pairs: finite, finite, changed)
    return still


def _all_still_finite(finite: jax.Array, pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    return jnp.all(jnp.stack([finite, *(jnp.all(jnp.isfinite(a) | ~jnp.isfinite(b)) for a, b in pairs)]))


def is_inexact(leaf: jax.Array) -> bool:
    """Whether a leaf has a real or complex dtype."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def keep_types(argument: str, new: Any, old: Any) -> Any:
    """Returns a new state in the dtypes of the old one; raises a TypeError where its tree or shapes changed."""
    new_tree, old_tree = str(jax.tree.structure(new)), str(jax.tree.structure(old))
    if new_tree != old_tree:
        raise TypeError(f"{argument}: its state changes from {old_tree} to {new_tree} in a step; it must stay.")

    def convert(a: Any, b: jax.Array) -> jax.Array:
        a = named_call(argument, jnp.asarray, a, name=f"asarray({shown(a)})")
        if a.shape != b.shape or (a.dtype != b.dtype and not (is_inexact(a) and is_inexact(b))):
            raise TypeError(
                f"{argument}: its state changes from {jax.typeof(b)} to {jax.typeof(a)} in a step; it must stay."
            )
        return a if a is b else strong_array(a.astype(b.dtype))

    return jax.tree.map(convert, new, old)


def strong_array(leaf: ArrayLike) -> jax.Array:
    """The leaf as an array whose dtype does not yield to others, as that of a Python number does."""
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):  # keys in the state of a user's optimizer
        return array
    return jax.lax.convert_element_type(array, array.dtype)
