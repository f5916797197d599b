"""The named axes of `pmap` and `shard_map`: which parameter lies along which, means and sums over them, blocks."""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optloss._check import shown

__all__ = [
    "AxisNames",
    "Block",
    "add_up",
    "all_along",
    "axes_along",
    "block_of",
    "check_axis_name",
    "check_param_specs",
    "is_inside_shard_map",
    "mean_of_losses",
    "mean_over",
    "parts",
    "spec_leaves",
    "vary",
    "varying_axes",
]

AxisNames: TypeAlias = tuple[Any, ...]


class Block(NamedTuple):
    """The part of an array that lies on this device."""

    shape: tuple[int, ...]  # of the whole array
    start: tuple[jax.Array, ...]  # of the part


def check_axis_name(axis_name: Any) -> AxisNames:
    """Returns the axes of `axis_name`, one name or a sequence of them; raises a TypeError for what is neither."""
    if axis_name is None:
        return ()
    names = tuple(axis_name) if isinstance(axis_name, list | tuple) else (axis_name,)
    if not all(isinstance(name, Hashable) and not isinstance(name, bool | int | float) for name in names):
        raise TypeError(f"axis_name: got {shown(axis_name)}; the name of an axis, or a tuple of them, would do.")
    if "" in names:
        raise ValueError(f"axis_name: got {shown(axis_name)}; the name of an axis, or a tuple of them, would do.")
    return names


def check_param_specs(param_specs: Any) -> None:
    """Raises a TypeError where a leaf of `param_specs` is no PartitionSpec."""
    for leaf in jax.tree.leaves(param_specs, is_leaf=_is_spec):
        if not _is_spec(leaf):
            raise TypeError(
                f"param_specs: got {shown(leaf)} of type {type(leaf).__name__}; a tree of PartitionSpecs, as "
                "`shard_map` takes for the parameters, would do."
            )


def spec_leaves(param_specs: Any, tree: Any) -> list[PartitionSpec] | None:
    """The spec of each leaf of a tree; None where there are no specs, or where their axes are not in scope.

    Outside of `shard_map` arrays are whole, and then specs say nothing.
    """
    specs = jax.tree.leaves(param_specs, is_leaf=_is_spec)
    if not all(_is_in_scope(axis) for spec in specs for axis in _axes_of(spec)) or not specs:
        return None
    try:
        spread = jax.tree.broadcast(param_specs, tree, is_leaf=_is_spec)
    except ValueError as error:
        raise ValueError(f"param_specs: no prefix of the parameters' tree: {error}") from error
    return jax.tree.leaves(spread, is_leaf=_is_spec)


def axes_along(names: Sequence[str], leaves: Sequence[jax.Array], specs: list[PartitionSpec] | None) -> list[AxisNames]:
    """The axes along which each leaf is cut.

    The types of arrays inside `shard_map` tell, unless `check_vma=False`; then, and in `pmap`, the specs are believed.
    """
    told: list[AxisNames] = [()] * len(leaves) if specs is None else [_axes_of(spec) for spec in specs]
    if not _types_tell():
        return told
    for name, leaf, axes in zip(names, leaves, told, strict=True):
        varying = varying_axes(leaf)
        if specs is not None and varying != set(axes):
            raise ValueError(
                f"param_specs: {name!r} differs along {_listed(varying)}, its PartitionSpec names {_listed(axes)}; "
                "the spec that shard_map's in_specs give it would do."
            )
    return [tuple(sorted(varying_axes(leaf), key=str)) for leaf in leaves]


def block_of(leaf: jax.Array, spec: PartitionSpec | None) -> Block | None:
    """Which part of the whole array a leaf is; None where it is the whole."""
    if spec is None or not _axes_of(spec):
        return None
    shape, start = list(leaf.shape), [jnp.zeros((), jnp.int32)] * leaf.ndim
    for dimension, entry in enumerate(spec):
        axes = _axes_of((entry,))
        if axes:
            shape[dimension] *= parts(axes)
            start[dimension] = jax.lax.axis_index(axes) * leaf.shape[dimension]
    return Block(tuple(shape), tuple(start))


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """The axes along which the type of an array lets it differ from device to device."""
    type_ = jax.typeof(x)
    if hasattr(type_, "manual_axis_type"):
        return frozenset(type_.manual_axis_type.varying)
    return frozenset(getattr(type_, "vma", ()))  # before JAX 0.8


def vary(tree: Any, axes: Sequence[Any]) -> Any:
    """The tree, allowed to differ along `axes`, where types tell that."""
    if not axes or not _types_tell():
        return tree

    def cast(leaf: jax.Array) -> jax.Array:
        more = tuple(axis for axis in axes if axis not in varying_axes(leaf))
        if not more:
            return leaf
        if hasattr(jax.lax, "pcast"):
            varied: jax.Array = jax.lax.pcast(leaf, more, to="varying")
        else:  # before JAX 0.9
            varied = jax.lax.pvary(leaf, more)  # type: ignore[attr-defined]  # it was there before JAX 0.9
        return varied

    return jax.tree.map(cast, tree)


def mean_over(tree: Any, axes: AxisNames, *, scalars_only: bool = False) -> Any:
    """The mean over axes of the real leaves of a tree; the same tree where there is no axis."""
    if not axes:
        return tree

    def mean(leaf: Any) -> Any:
        is_real = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jax.lax.pmean(leaf, axes) if is_real and not (scalars_only and leaf.shape) else leaf

    return jax.tree.map(mean, tree)


def mean_of_losses(gradients: Any, along: Sequence[AxisNames], axes: AxisNames) -> Any:
    """The gradients of the mean over `axes` of the devices' losses, from the gradients of those.

    That of a parameter that is cut along an axis has the sum over it already, by the rule of the collective that
    brings its parts together.
    """
    leaves, treedef = jax.tree.flatten(gradients)
    means = []
    for leaf, own in zip(leaves, along, strict=True):
        leaf = mean_over(leaf, tuple(axis for axis in axes if axis not in own))
        count = parts(tuple(axis for axis in axes if axis in own))
        means.append(leaf if count == 1 else leaf / count)
    return jax.tree.unflatten(treedef, means)


def parts(axes: AxisNames) -> int:
    """Into how many parts axes cut an array."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def add_up(numbers: Sequence[jax.Array], along: Sequence[AxisNames]) -> list[jax.Array]:
    """The sum of each number over the axes along which its array is cut; one collective for all that share them."""
    sums = list(numbers)
    for axes in dict.fromkeys(along):
        if axes:
            places = [i for i, own in enumerate(along) if own == axes]
            for i, total in zip(places, jax.lax.psum([sums[i] for i in places], axes), strict=True):
                sums[i] = total
    return sums


def all_along(flag: jax.Array, along: Sequence[AxisNames]) -> jax.Array:
    """Whether a flag is true on all devices between which it could differ."""
    axes = tuple(dict.fromkeys([*sorted(varying_axes(flag), key=str), *(axis for own in along for axis in own)]))
    return jax.lax.psum((~flag).astype(jnp.int32), axes) == 0 if axes else flag


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _axes_of(spec: Any) -> AxisNames:
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return tuple(axis for entry in entries for axis in entry if axis is not None)


def _is_in_scope(axis: Any) -> bool:
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True


def is_inside_shard_map() -> bool:
    """Whether arrays are parts here."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _types_tell() -> bool:
    """Whether this is the inside of a `shard_map` that checks what varies."""
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return bool(manual) and bool(varying_axes(jax.lax.axis_index(manual[0])))


def _listed(axes: Any) -> str:
    return ", ".join(repr(axis) for axis in sorted(axes, key=str)) or "no axis"
