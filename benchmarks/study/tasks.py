"""Tasks of the study that need no download: handwritten digits, and text that comes with Python."""

from __future__ import annotations

import hashlib
import inspect
import math
import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotolora import demo

Split = tuple[Tensor, Tensor]  # inputs and targets; a row is a sample

CHARACTERS, LENGTH = 128, 64
TRAIN, HELD_OUT = 150_000, 6_400  # characters per domain
POOL = 10  # batches whose rows are sorted by length together
# modules of the standard library on whose source code the base model is pretrained
CODE = (
    "argparse", "ast", "asyncio.base_events", "calendar", "collections", "configparser", "csv", "dataclasses",
    "difflib", "email.message", "fractions", "ftplib", "gettext", "http.client", "inspect", "json.decoder", "locale",
    "mailbox", "optparse", "pathlib", "pdb", "pickle", "shutil", "statistics", "subprocess", "tarfile", "typing",
    "unittest.case", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """The training, validation and test data of one task."""

    train: Split
    validation: Split
    test: Split
    digest: str = ""  # hash of the data, which may differ between versions of Python


@dataclass(frozen=True)
class Setting:
    """A base model and the tasks to which it is adapted.

    Attributes:
        unit: unit of the score, shown in tables.
        pretrained: number of pretraining steps → the base model.
        score: (model, split) → score, larger is better.
        targets, exclude, trainable, rank, alpha: arguments of `cotolora.inject`.
        batch: batch size.
        lengths: inputs → length of each sample without padding; if given, batches hold samples of similar length.
    """

    name: str
    unit: str
    pretrained: Callable[[int], nn.Module]
    domains: dict[str, Domain]
    score: Callable[[nn.Module, Split], float]
    targets: str | list[str]
    batch: int
    trainable: list[str] = field(default_factory=list)
    exclude: str | list[str] = field(default_factory=list)
    rank: int = 4
    alpha: float = 8.0
    lengths: Callable[[Tensor], Tensor] | None = None


def batches(
    split: Split, size: int, steps: int, seed: int, lengths: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Split]:
    """`steps` batches of random rows, reproducible by `seed`; with `lengths`, each of rows of similar length."""
    generator = torch.Generator().manual_seed(seed)
    at_once = 1 if lengths is None else POOL
    for step in range(steps):
        if step % at_once == 0:
            rows = torch.randint(len(split[0]), (at_once * size,), generator=generator)
            if lengths is not None:
                rows = rows[lengths(split[0][rows]).argsort(stable=True)]
                pool = rows.view(at_once, size)[torch.randperm(at_once, generator=generator)]
            else:
                pool = rows.view(1, size)
        chosen = pool[step % at_once]
        yield split[0][chosen], split[1][chosen]


def learn(model: nn.Module, split: Split, size: int, steps: int, rate: float) -> nn.Module:
    """Trains all parameters of the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for x, y in batches(split, size, steps, seed=0):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model.eval()


def digits() -> Setting:
    """The demo's vision transformer, pretrained on the digits 0 to 4 and adapted to all ten."""
    data = demo.load_data(torch.device("cpu"))
    known = data.train[1] < 5

    def pretrained(steps: int) -> nn.Module:
        torch.manual_seed(0)
        return learn(demo.VisionTransformer(), (data.train[0][known], data.train[1][known]), demo.BATCH, steps, 1e-3)

    return Setting(
        "digits", "accuracy %", pretrained, {"digits": Domain(data.train, data.validation, data.test)},
        demo.accuracy, demo.PARTS, demo.BATCH, trainable=["head"],
    )  # fmt: skip


class CharacterModel(nn.Module):
    """A small character-level Llama over ASCII; its logits have the shape that `F.cross_entropy` expects."""

    def __init__(self, hidden: int = 64, layers: int = 6) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=CHARACTERS, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH, use_cache=False,
            )
        )  # fmt: skip

    def forward(self, characters: Tensor) -> Tensor:
        """``[batch, length]`` → logits ``[batch, characters, length]``."""
        return self.llama(characters).logits.transpose(1, 2)


def text() -> Setting:
    """A small Llama pretrained on Python source code, adapted to English prose, character names and code tables."""

    def pretrained(steps: int) -> nn.Module:
        torch.manual_seed(0)
        return learn(CharacterModel(), rows_of(library_code()), 32, steps, 3e-3)

    texts = {"prose": prose(), "names": character_names(), "tables": code_pages()}
    domains = {name: domain_of(name, told) for name, told in texts.items()}
    return Setting(
        "text", "bits per character, negated", pretrained, domains, minus_bits, "all-linear", 16, exclude=["lm_head"],
    )  # fmt: skip


@torch.no_grad()
def minus_bits(model: nn.Module, split: Split) -> float:
    """Bits per character, negated: larger is better."""
    was_training = model.training
    model.eval()
    parts = zip(split[0].split(64), split[1].split(64), strict=True)
    nats = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in parts)
    model.train(was_training)
    return -nats / math.log(2) / split[1].numel()


def domain_of(name: str, told: str) -> Domain:
    """A domain from a text, cut into training, validation and test parts."""
    if len(told) < TRAIN + 2 * HELD_OUT:
        raise ValueError(f"{name} must have at least {TRAIN + 2 * HELD_OUT} characters; this Python's has {len(told)}")
    cuts = TRAIN, TRAIN + HELD_OUT, TRAIN + 2 * HELD_OUT
    parts = [told[start:end] for start, end in zip((0, *cuts), cuts, strict=False)]
    return Domain(*(rows_of(part) for part in parts), digest=hashlib.sha256(told[: cuts[-1]].encode()).hexdigest()[:12])


def rows_of(told: str) -> Split:
    """Characters and next characters, each ``[rows, LENGTH]``; non-ASCII characters become question marks."""
    codes = torch.frombuffer(bytearray(told.encode("ascii", "replace")), dtype=torch.uint8).long()
    rows = (len(codes) - 1) // LENGTH
    return codes[: rows * LENGTH].view(rows, LENGTH), codes[1 : rows * LENGTH + 1].view(rows, LENGTH)


def library_code() -> str:
    """Source code of modules of the standard library."""
    found = []
    for name in CODE:
        try:
            found.append(inspect.getsource(__import__(name, fromlist=["_"])))
        except (ImportError, OSError):  # older and newer versions of Python lack some of them
            continue
    return "".join(found)


def prose() -> str:
    """The language reference as contained in Python's help system."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def character_names() -> str:
    """Names of Unicode characters, one per line, shuffled with a fixed seed."""
    names = [unicodedata.name(chr(code), "") for code in range(0x20, 0x3000)]
    lines = [name for name in names if name]
    random.Random(0).shuffle(lines)
    return "\n".join(lines)


def code_pages() -> str:
    """Source code of the tables of old character sets."""
    import encodings
    import pkgutil

    names = sorted(module.name for module in pkgutil.iter_modules(encodings.__path__))
    chosen = [name for name in names if name.startswith(("cp", "iso8859", "koi8", "mac_"))]
    random.Random(0).shuffle(chosen)  # otherwise the held-out part would have tables of only one family
    return "".join(inspect.getsource(__import__(f"encodings.{name}", fromlist=["_"])) for name in chosen)
