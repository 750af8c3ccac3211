"""Checks with one small collective that all ranks of a distributed run have the same values."""

from __future__ import annotations

import hashlib
import reprlib
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist


def check_agreement(what: str, values: Mapping[str, object]) -> None:
    """Raises on every rank of the default process group unless all ranks have the same `values`.

    One all-gather of eight bytes per value: a hash of its repr. Every rank must call this, with the same names; if one
    does not, the others wait for it until the timeout of the process group. Does nothing without a process group or
    with a single rank.

    Args:
        what: the owner of the values, for the message.
        values: values by name; equal ones must have equal reprs on every rank.

    Raises:
        RuntimeError: ranks differ. The message lists the ranks that differ from the most common value (of equally
            common ones, that of the lowest rank), the names of the values that differ, and the values on this rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    # "cpu:gloo,cuda:nccl" or "cuda:nccl": the first device that the group can send from
    device = dist.get_backend_config().partition(":")[0]
    own = torch.tensor([_hashed(value) for value in values.values()], dtype=torch.int64, device=device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    table = torch.stack(rows).tolist()
    # of equally common values most_common returns the first, that of the lowest rank
    majority = [Counter(column).most_common(1)[0][0] for column in zip(*table, strict=True)]
    differing = {
        rank: [name for name, got, common in zip(values, row, majority, strict=True) if got != common]
        for rank, row in enumerate(table)
        if row != majority
    }
    if differing:
        ranks = "; ".join(f"rank {rank} differs in {', '.join(found)}" for rank, found in differing.items())
        names = dict.fromkeys(name for found in differing.values() for name in found)
        here = ", ".join(f"{name} = {reprlib.repr(values[name])}" for name in names)
        raise RuntimeError(f"every rank must have the same {what}; {ranks}; rank {dist.get_rank()} has {here}")


def _hashed(value: object) -> int:
    digest = hashlib.sha256(repr(value).encode()).digest()  # not hash(), which differs between processes
    return int.from_bytes(digest[:8], "little", signed=True)
