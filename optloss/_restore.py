"""`restore`: what a checkpoint gave, put into a new state; what differs is told."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optloss._checksums import checksums as checksums_of
from optloss._fingerprint import FINGERPRINTED
from optloss._names import parameter_names
from optloss._pipeline import OptState

__all__ = ["restore"]

_STAGES = ("noise", "multipliers", "clip")  # whose state may come and go: it hangs on nothing else
_MOST_SHOWN = 20


def restore(state: Any, saved: Any, checksums: Mapping[str, str] | None = None) -> Any:
    """Puts what a checkpoint gave into a new state, and tells what the two differ by.

    Every `OptState` carries a fingerprint of the settings and parameters that it was made for. Where all is equal, what
    comes back is what was saved. What was added since starts fresh, what was taken away is dropped, and a setting that
    was changed holds from now on, each with a warning that says so. A learning rate is in the state: the saved one goes
    on. Everything else is an error, so that nothing is guessed: another optimizer, other parameters, shapes or dtypes.

    Args:
        state: The state to go on from, new from `init`: a `TrainState`, or a tree with a `TransformationState` in it.
            What comes back lies on devices as it does.
        saved: What a checkpoint gave of such a state. Its containers may be others: Orbax without a target gives dicts
            and lists for NamedTuples and tuples.
        checksums: What `optloss.checksums` gave of the state that was saved; None looks at no content.

    Returns:
        A state like `state`, with copies of the saved arrays.

    Raises:
        ValueError: With a list of the differences, where they cannot be bridged; or with the arrays whose checksums are
            others.

    Warns:
        UserWarning: What started fresh, was dropped, or has another setting.

    Example:
        >>> train = optloss.optimize_loss(lambda w, x: (w - x) ** 2, 0, 0.1, "Adam")
        >>> state, _ = train.update(train.init(0.0), 1.0)
        >>> saved, beside = jax.device_get(state), optloss.checksums(state)
        >>> again = optloss.restore(train.init(0.0), saved, beside)
        >>> optloss.checksums(again) == beside
        True

    TF1's `Saver` restored by name and raised a NotFoundError for what was not there; it did not know of settings.
    """
    new, old = _by_name(state), _by_name(saved)
    if checksums is not None:
        _check_sums(saved, checksums)
    parts, fresh = _parts(state), set[str]()
    refused, told = list[str](), list[str]()
    for part in parts:
        if part.name and not any(name.startswith(part.name) for name in old):
            fresh.update(name for name in new if name.startswith(part.name))
            told.append(f"{part.name.rstrip('/')}: it was not saved and starts fresh")
            continue
        fresh.add(f"{part.name}fingerprint")
        for stage in _STAGES:
            told.extend(_compare_stage(f"{part.name}{stage}", new, old, fresh))
        _compare_settings(part, old, refused, told)
    own = tuple(part.name for part in parts)
    loose = tuple(f"{part.name}{stage}" for part in parts for stage in _STAGES)
    figures = tuple(f"{part.name.removesuffix('opt_state/')}summaries/" for part in parts)  # of a TransformationState
    fresh.update(name for name in new if name.startswith(figures) and _difference(name, new[name], old))
    for name in sorted(new.keys() - fresh):
        refused.extend(_difference(name, new[name], old))
    for name in sorted(old.keys() - new.keys()):
        if name.startswith(loose) or (name.startswith("opt_states/") and not name.startswith(own)):
            told.append(f"{name}: it was saved and is dropped")
        elif not name.startswith(figures):
            refused.append(f"{name}: it was saved, and is not in the state now")
    if refused:
        raise ValueError(f"saved: it does not fit this state:\n  {_listed(refused)}")
    if told:
        warnings.warn(f"restore: what was saved is not all of this state:\n  {_listed(told)}", UserWarning, 2)
    leaves = [leaf if name in fresh else _like(old[name], leaf) for name, leaf in new.items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


class _Part(NamedTuple):
    """An `OptState` in a state."""

    name: str  # its path with a "/" at the end; "" where it is the whole
    state: OptState


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(zip(parameter_names(tree), jax.tree.leaves(tree), strict=True))


def _parts(state: Any) -> list[_Part]:
    """Every `OptState` in a state."""

    def is_part(node: Any) -> bool:
        return isinstance(node, OptState)

    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_part)
    found = [
        _Part(jax.tree_util.keystr((*path, jax.tree_util.GetAttrKey("")), simple=True, separator="/"), node)
        for path, node in nodes
        if is_part(node)
    ]
    if not found:
        raise ValueError(
            f"state: got {type(state).__name__} without an OptState in it; what init of a train op gives would do."
        )
    return found


def _check_sums(saved: Any, checksums: Mapping[str, str]) -> None:
    found = checksums_of(saved)
    wrong = [f"{name}: {found.get(name, 'missing')} instead of {checksums[name]}" for name in checksums]
    wrong = [line for name, line in zip(checksums, wrong, strict=True) if found.get(name) != checksums[name]]
    wrong += [f"{name}: it has no checksum" for name in found.keys() - checksums.keys()]
    if wrong:
        raise ValueError(f"checksums: not what was saved came back:\n  {_listed(wrong)}")


def _compare_stage(name: str, new: Mapping[str, Any], old: Mapping[str, Any], fresh: set[str]) -> list[str]:
    """What is to be told of a stage's state: it is taken whole, or starts fresh."""
    inside = [each for each in new if each.startswith(f"{name}/") or each == name]
    differing = [each for each in inside if _difference(each, new[each], old)]
    if not differing:
        return []
    fresh.update(inside)
    return [f"{name}: it was not saved like this and starts fresh"]


def _compare_settings(part: _Part, old: Mapping[str, Any], refused: list[str], told: list[str]) -> None:
    """Compares the fingerprints, row by row."""
    now, was = np.asarray(part.state.fingerprint), old.get(f"{part.name}fingerprint")
    if was is None:
        told.append(f"{part.name}fingerprint: none was saved, so that settings cannot be compared")
        return
    was, known = np.asarray(was), min(now.shape[-2], np.shape(was)[-2])
    for row, setting in enumerate(FINGERPRINTED[:known]):
        if not np.any(now[..., row, 0] != was[..., row, 0]):
            continue
        before, after = (_shown(rows[..., row, 1]) for rows in (was, now))
        change = f"{part.name}{setting}: " + (
            "it is not what it was" if before == after else f"saved with {before}, now {after}"
        )
        if setting == "kind of optimizer":
            refused.append(f"{part.name}optimizer: another was saved; its slots mean something else")
        elif setting == "learning_rate":
            told.append(f"{change}; the saved rate goes on, since it is in the state")
        elif setting != "params":  # these are compared one by one
            told.append(change)


def _shown(bits: Any) -> str:
    """A number whose bits a fingerprint has."""
    value = float(np.asarray(bits, np.uint32).reshape(-1)[:1].view(np.float32)[0])
    return "no number" if np.isnan(value) else f"{value:g}"


def _difference(name: str, new: Any, old: Mapping[str, Any]) -> list[str]:
    """What keeps a saved array from being put in the place of a new one."""
    if name not in old:
        return [f"{name}: it was not saved"]
    dtype = new.dtype if hasattr(new, "dtype") else np.asarray(old[name]).dtype  # Flax's step is a number
    array = old[name] if hasattr(old[name], "dtype") else np.asarray(old[name], dtype)
    came, wanted = f"{array.dtype}{list(array.shape)}", f"{dtype}{list(np.shape(new))}"
    if came != wanted:
        return [f"{name}: saved as {came}, now {wanted}"]
    is_count = name.endswith(("global_step", "nonfinite_steps")) and array.shape == ()
    return [f"{name}: saved as {array}, and no count is below 0"] if is_count and int(array) < 0 else []


def _like(saved: Any, leaf: Any) -> Any:
    """A copy of a saved array, where the new one lies: the update will donate it."""
    if not isinstance(leaf, jax.Array):  # where the new state has NumPy's, or a number
        return np.array(saved) if isinstance(leaf, np.ndarray | np.generic) else type(leaf)(saved)
    return jax.device_put(
        jnp.copy(saved) if isinstance(saved, jax.Array) else np.array(saved, leaf.dtype), leaf.sharding
    )


def _listed(lines: list[str]) -> str:
    rest = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    return "\n  ".join([*lines[:_MOST_SHOWN], *rest])
