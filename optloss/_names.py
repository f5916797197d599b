"""The name of each parameter, patterns over names, and which parameters a setting selects."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optloss._check import check_arity, did_you_mean, named_call, shown

__all__ = ["Variables", "check_like", "check_variables", "match_names", "parameter_names", "select_parameters"]

Variables: TypeAlias = str | Sequence[str] | Callable[[str], bool] | Any  # the last: a tree of booleans


def parameter_names(params: Any) -> list[str]:
    """Returns the "/"-joined path of each leaf, in the order of `jax.tree.leaves`.

    They are the names that a framework's users know: `encoder/kernel` in Flax, without the `/value` of NNX's variables
    and of boxes such as `nn.Partitioned`; `mlp/~/linear_0/w` in Haiku; `layers/0/weight` in Equinox.

    Args:
        params: Any pytree. A bare array is called "params".

    Raises:
        ValueError: Two leaves have one name.

    Example:
        >>> optloss.parameter_names({"encoder": [{"kernel": 0.0}, {"kernel": 0.0}]})
        ['encoder/0/kernel', 'encoder/1/kernel']
    """
    names = [jax.tree_util.keystr(path, simple=True, separator="/") if path else "params" for path in _paths(params)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"params: two parameters are named {shown(twice)}; rename one of them.")
    return names


def _paths(params: Any) -> list[tuple[Any, ...]]:
    """The path of each leaf; of the one leaf in a box of Flax, that of the box."""
    paths: list[tuple[Any, ...]] = []
    for path, node in jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_box)[0]:
        inner = [inside for inside, _ in jax.tree_util.tree_flatten_with_path(node)[0]]
        paths.extend([path] if len(inner) == 1 else [path + inside for inside in inner])
    return paths


def _is_box(node: Any) -> bool:
    """Whether a node is one of Flax's: a variable of NNX, or an array with metadata. Flax is not imported for that."""
    return any(
        kind.__name__ in ("Variable", "VariableState", "AxisMetadata") and kind.__module__.startswith("flax.")
        for kind in type(node).__mro__
    )


def check_like(what: str, tree: Any, like: Any) -> None:
    """Raises a ValueError that names the first array of a tree that is not as its like is."""
    came, wanted = (dict(zip(parameter_names(each), jax.tree.leaves(each), strict=True)) for each in (tree, like))
    for name in [*wanted, *came]:
        shapes = [f"shape {np.shape(leaves[name])}" if name in leaves else "nothing" for leaves in (came, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{what} {shown(name)}: got {shapes[0]}; {shapes[1]} would do.")


def match_names(argument: str, keys: Iterable[str], names: Sequence[str], *, all_match: bool = True) -> dict[str, str]:
    """Returns which of `keys` each of `names` is matched by, for those that are.

    A key is a name or a pattern: `*` matches within one part of a path, `**` any number of parts. A key equal to
    the name goes before every pattern.

    Raises:
        ValueError: Two patterns match one name, or, where `all_match`, a key matches none.
    """
    known = set(names)
    exact = {key for key in keys if key in known}
    patterns = [key for key in keys if key not in known]
    matched = {name: name for name in exact}
    used = set(exact)
    parts = {pattern: _parts(pattern) for pattern in patterns}
    for name in names:
        hits = [pattern for pattern in patterns if _matches(parts[pattern], name.split("/"))]
        used.update(hits)
        if name not in exact and len(hits) > 1:
            raise ValueError(
                f"{argument}: {shown(hits[0])} and {shown(hits[1])} both match the parameter {shown(name)}; "
                "name it in full, or narrow one of them."
            )
        if name not in exact and hits:
            matched[name] = hits[0]
    for key in patterns:
        if all_match and key not in used:
            raise ValueError(_unknown_name(argument, key, names))
    return matched


def _unknown_name(argument: str, key: str, names: Sequence[str]) -> str:
    kind = "matches" if "*" in key else "is named"
    known = ", ".join(repr(name)[1:61].rstrip("'") for name in names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{argument}: no parameter {kind} {shown(key)}.{did_you_mean(key, names)} Parameters: {known}."


def _parts(pattern: str) -> list[str]:
    """The parts of a pattern; one `**` for several that follow each other."""
    parts = pattern.split("/")
    return [part for i, part in enumerate(parts) if not (part == "**" and parts[i - 1 : i] == ["**"])]


def _matches(pattern: list[str], path: list[str]) -> bool:
    """Whether the parts of a pattern match the parts of a path; linear work for each part, whatever the pattern."""
    reached = {0}  # how many parts of the pattern can have been used up by the parts of the path so far
    for part in path:
        reached = _skip_stars(pattern, reached)
        reached = {
            at if pattern[at] == "**" else at + 1
            for at in reached
            if at < len(pattern) and (pattern[at] == "**" or _part_matches(pattern[at], part))
        }
    return len(pattern) in _skip_stars(pattern, reached)


def _skip_stars(pattern: list[str], reached: set[int]) -> set[int]:
    """Adds the places behind each `**` that is reached, since it may match nothing."""
    reached = set(reached)
    for at, part in enumerate(pattern):
        if part == "**" and at in reached:
            reached.add(at + 1)
    return reached


def _part_matches(pattern: str, part: str) -> bool:
    literal = pattern.replace("[", "[[]").replace("?", "[?]")  # `*` alone is special here
    return fnmatch.fnmatchcase(part, literal)


def check_variables(variables: Variables | None) -> None:
    """Raises what can be said of `variables` before the parameters are known."""
    if variables is None or isinstance(variables, str):
        return
    if callable(variables):
        check_arity("variables", variables, ["name"])
        return
    leaves = jax.tree.leaves(variables)
    if not leaves:
        raise ValueError(
            f"variables: No variables to optimize: got {shown(variables)}; names, patterns, a function of a name, "
            "a tree of booleans, or None for all would do."
        )
    if all(isinstance(leaf, str) for leaf in leaves) and isinstance(variables, list | tuple):
        return
    for leaf in leaves:
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(f"variables: got {shown(leaf)} among them; names alone or booleans alone would do.")


def select_parameters(variables: Variables | None, params: Any) -> list[bool]:
    """Returns for each leaf of `params` whether it is trained.

    Leaves without a gradient (integers, booleans) never are.

    Raises:
        ValueError: A name that is no parameter's, or nothing is selected.
        TypeError: A complex parameter is selected.
    """
    names = parameter_names(params)
    leaves = jax.tree.leaves(params)
    real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    chosen = _chosen(variables, params, names)
    for name, leaf, is_chosen, is_real in zip(names, leaves, chosen, real, strict=True):
        if is_chosen and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"params: {shown(name)} is {leaf.dtype}, whose gradient is not a direction of descent; keep the real "
                "and the imaginary part as two parameters, or leave it out of `variables`."
            )
        if isinstance(variables, list | tuple) and name in variables and not is_real:
            raise ValueError(f"variables: {shown(name)} is {leaf.dtype} and has no gradient; a real one would do.")
    selected = [a and b for a, b in zip(chosen, real, strict=True)]
    if not any(selected):
        came = f"variables: got {shown(variables)}; " if names else "params: got a tree without arrays; "
        raise ValueError(f"{came}No variables to optimize: none with a gradient is selected.")
    return selected


def _is_chosen(variables: Callable[[str], Any], name: str) -> bool:
    chosen = named_call("variables", variables, name)
    if not isinstance(chosen, bool | np.bool_):
        raise TypeError(f"variables: the function returned {shown(chosen)} for {shown(name)}; True or False would do.")
    return bool(chosen)


def _chosen(variables: Variables | None, params: Any, names: list[str]) -> list[bool]:
    """What `variables` says of each leaf, whatever its dtype."""
    if variables is None:
        return [True] * len(names)
    if callable(variables):
        return [_is_chosen(variables, name) for name in names]
    keys = [variables] if isinstance(variables, str) else variables
    if isinstance(keys, list | tuple) and all(isinstance(key, str) for key in keys):
        matched: set[str] = set()
        for key in dict.fromkeys(keys):  # one by one: here two patterns may share a parameter
            matched.update(match_names("variables", [key], names))
        return [name in matched for name in names]
    try:
        spread = jax.tree.map(lambda keep, part: jax.tree.map(lambda _: bool(keep), part), variables, params)
    except (TypeError, ValueError) as error:
        first_line = str(error).split("\n", 1)[0]
        raise ValueError(f"variables: the tree of booleans is not the parameters' tree: {first_line}") from error
    return jax.tree.leaves(spread)
