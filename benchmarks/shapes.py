"""The linears to measure: those of one block of a well-known model, or a single one of size M,K,N."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Linear:
    """One linear and what it reads: an input of the block (q, k and v share one) or another linear's output."""

    name: str
    in_features: int
    out_features: int
    reads: str
    bias: bool = False


def llama(hidden: int, intermediate: int, kv: int, *, bias: bool = False) -> tuple[Linear, ...]:
    """The seven linears of a block with gated MLP; `bias` adds a bias to q, k and v, as in Qwen2."""
    return (
        Linear("q", hidden, hidden, "normed", bias),
        Linear("k", hidden, kv, "normed", bias),
        Linear("v", hidden, kv, "normed", bias),
        Linear("o", hidden, hidden, "attended"),
        Linear("gate", hidden, intermediate, "normed again"),
        Linear("up", hidden, intermediate, "normed again"),
        Linear("down", intermediate, hidden, "activated"),
    )


def vit(hidden: int) -> tuple[Linear, ...]:
    """The six linears of a vision-transformer block."""
    return (
        *(Linear(name, hidden, hidden, "normed", bias=True) for name in ("q", "k", "v")),
        Linear("proj", hidden, hidden, "attended", bias=True),
        Linear("fc1", hidden, 4 * hidden, "normed again", bias=True),
        Linear("fc2", 4 * hidden, hidden, "activated", bias=True),
    )


def three_linears(hidden: int) -> tuple[Linear, ...]:
    """The chain d → d → 4d → d: small models on a CPU, where adapters have the largest relative cost."""
    return (
        Linear("first", hidden, hidden, "x", bias=True),
        Linear("up", hidden, 4 * hidden, "first", bias=True),
        Linear("down", 4 * hidden, hidden, "up", bias=True),
    )


def inputs(linears: Sequence[Linear]) -> dict[str, int]:
    """Widths of the block's inputs by name."""
    names = {linear.name for linear in linears}
    return {linear.reads: linear.in_features for linear in linears if linear.reads not in names}


def outputs(linears: Sequence[Linear]) -> list[int]:
    """Indices of the linears whose output no other linear reads."""
    read = {linear.reads for linear in linears}
    return [i for i, linear in enumerate(linears) if linear.name not in read]


# sizes from the models' published configurations
BLOCKS = {
    "llama3-8b": llama(4096, 14336, 1024),
    "llama2-7b": llama(4096, 11008, 4096),
    "qwen2.5-7b": llama(3584, 18944, 512, bias=True),
    "qwen3-8b": llama(4096, 12288, 1024),
    "vit-b": vit(768),
    "three-768": three_linears(768),
    "three-256": three_linears(256),
    "three-64": three_linears(64),
}


def title(shape: str) -> str:
    """A block's name with the widths of its chain or its number of linears; for any other shape, only the name."""
    if shape not in BLOCKS:
        return shape
    block = BLOCKS[shape]
    widths = [block[0].in_features, *(linear.out_features for linear in block)]
    chain = all(linear.reads == before.name for before, linear in itertools.pairwise(block))
    return f"{shape} ({' → '.join(map(str, widths)) if chain else f'{len(block)} linears'})"


def distinct(model: str) -> tuple[tuple[int, int], ...]:
    """The distinct (K, N) of a model's linears."""
    return tuple(dict.fromkeys((linear.in_features, linear.out_features) for linear in BLOCKS[model]))


def number(kind: Callable[[str], float]) -> Callable[[str], Any]:
    """An argparse type: a positive finite number."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            what = "integer" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a positive {what}; got {text!r}")
        return value

    return parse


def shape(text: str) -> list[tuple[int | None, int, int]]:
    """An argparse type: the linears of a model (M comes from --rows), or one M,K,N."""
    if text in BLOCKS:
        return [(None, *linear) for linear in distinct(text)]
    try:
        m, k, n = map(number(int), text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        names = ", ".join(BLOCKS)
        raise argparse.ArgumentTypeError(f"must be {names} or M,K,N, all positive; got {text!r}") from None
    return [(m, k, n)]
