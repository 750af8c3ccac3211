"""Whether all ranks of a distributed run have the same facts, by one small collective."""

from __future__ import annotations

import hashlib
import reprlib
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist


def check_agreement(what: str, facts: Mapping[str, object]) -> None:
    """Raises on every rank of the default process group if some rank holds other `facts`; else does nothing.

    One all-gather of eight bytes a fact, over hashes of the facts' repr. Every rank must call this, with the same
    keys; a rank that does not come keeps the others waiting for the timeout of the process group. Without a
    process group, or with one rank, there is nothing to do.

    Args:
        what: whose facts, for the message.
        facts: by name, all with a repr that is the same wherever the fact is.

    Raises:
        RuntimeError: names the ranks that differ from the majority (from rank 0 and those who agree with it, where
            there is no majority), in what, and what this rank has.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    # "cpu:gloo,cuda:nccl" or "cuda:nccl": the first device that the group can send from
    device = dist.get_backend_config().partition(":")[0]
    own = torch.tensor([_hashed(value) for value in facts.values()], dtype=torch.int64, device=device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    table = torch.stack(rows).tolist()
    # most_common gives the first of equals, which is the one of the lowest rank
    usual = [Counter(column).most_common(1)[0][0] for column in zip(*table, strict=True)]
    apart = {
        rank: [name for name, value, common in zip(facts, row, usual, strict=True) if value != common]
        for rank, row in enumerate(table)
        if row != usual
    }
    if apart:
        ranks = "; ".join(f"rank {rank} differs in {', '.join(names)}" for rank, names in apart.items())
        differing = dict.fromkeys(name for names in apart.values() for name in names)
        here = ", ".join(f"{name} = {reprlib.repr(facts[name])}" for name in differing)
        raise RuntimeError(f"every rank must have the same {what}; {ranks}; rank {dist.get_rank()} has {here}")


def _hashed(value: object) -> int:
    digest = hashlib.sha256(repr(value).encode()).digest()  # not hash(), which differs between processes
    return int.from_bytes(digest[:8], "little", signed=True)
