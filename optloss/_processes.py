"""Whether the processes of a run agree on what they are about to train."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from optloss._names import parameter_names

__all__ = ["check_processes_agree", "digest", "facts_of_arrays", "versions"]

_HASH_SIZE = 16
_SHOWN = 4  # entries of a fact, and facts, that a message has
_LONGEST = 200  # characters of a fact


def check_processes_agree(facts: Mapping[str, str]) -> None:
    """Raises a ValueError in every process where a fact is not the same in all of them.

    Every process has to call it, with the same names of facts: they wait for each other.
    """
    from jax.experimental import multihost_utils  # slow to import, and for several processes alone

    def gather(rows: list[bytes], width: int) -> np.ndarray:
        table = np.frombuffer(b"".join(row.ljust(width) for row in rows), np.uint8).reshape(len(rows), width)
        return np.asarray(multihost_utils.process_allgather(table))

    digests = gather([_hash(fact.encode()) for fact in facts.values()], _HASH_SIZE)
    names = [name for i, name in enumerate(facts) if np.any(digests[:, i] != digests[0, i])]
    if not names:
        return
    differing = [facts[name].encode() for name in names]
    lengths = multihost_utils.process_allgather(np.asarray([len(fact) for fact in differing], np.int32))
    texts = gather(differing, int(np.max(lengths)))
    lines = [
        f"{name}: {_by_process([bytes(row).rstrip().decode() for row in texts[:, i]])}" for i, name in enumerate(names)
    ]
    raise ValueError("init: the processes do not agree, and would drift apart:\n  " + "\n  ".join(lines))


def facts_of_arrays(argument: str, tree: Any) -> dict[str, str]:
    """The names and types of a tree's arrays, and which of them have which contents.

    Of an array that lies on several processes each has its part, and there is nothing to compare but where all have
    the whole.
    """
    leaves = jax.tree.leaves(tree)
    names = parameter_names(tree)
    types = [f"{name} {leaf.dtype}{list(leaf.shape)}" for name, leaf in zip(names, leaves, strict=True)]
    wholes = []
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                continue
            leaf = leaf.addressable_data(0)
        wholes.append(f"{name} {digest(np.asarray(leaf).tobytes())}")
    return {f"{argument}, names and types": "; ".join(types), f"{argument}, values": "; ".join(wholes)}


def versions() -> str:
    """The versions of what a step is made by."""
    return ", ".join(f"{package.__name__} {package.__version__}" for package in (jax, optax, np))


def digest(content: bytes) -> str:
    """A short name for some bytes."""
    return _hash(content)[:4].hex()


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_HASH_SIZE).digest()


def _by_process(facts: list[str]) -> str:
    """What the processes have: the first entries that differ; processes that have the same, together."""
    entries = [fact.split("; ") for fact in facts]
    if len({len(row) for row in entries}) == 1:
        differing = [i for i, column in enumerate(zip(*entries, strict=True)) if len(set(column)) > 1][:_SHOWN]
        facts = ["; ".join(row[i] for i in differing) for row in entries]
    owners: dict[str, list[str]] = {}
    for process, fact in enumerate(facts):
        owners.setdefault(fact, []).append(str(process))
    return "; ".join(f"process {', '.join(own[:8])} has {_cut(fact)}" for fact, own in list(owners.items())[:_SHOWN])


def _cut(fact: str) -> str:
    """A fact of at most a few lines."""
    return fact if len(fact) <= _LONGEST else f"{fact[:_LONGEST]}... ({digest(fact.encode())})"
