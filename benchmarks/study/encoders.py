"""Settings with a pretrained text encoder from disk and labelled texts of one or several domains."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study import corpora
from benchmarks.study.corpora import Sentence
from benchmarks.study.tasks import Domain, Setting, Split

CHUNK = 64  # texts per forward when scoring
PAD = -1  # no valid token id is negative, whatever id the tokenizer uses for padding


class Encoder(nn.Module):
    """A transformers classifier: padded token ids ``[texts, length]`` → logits ``[texts, labels]``."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.model = classifier

    def forward(self, tokens: Tensor) -> Tensor:
        """Computes the logits, with padding only up to the longest text of the batch."""
        tokens = tokens[:, : int(lengths(tokens).max())]
        there = tokens != PAD
        return self.model(input_ids=tokens.where(there, 0), attention_mask=there.long()).logits


def lengths(tokens: Tensor) -> Tensor:
    """The number of tokens of each text."""
    return (tokens != PAD).sum(1)


def by_length(split: Split) -> Split:
    """The texts sorted by length, longest first, so that neighbours need little padding."""
    order = lengths(split[0]).argsort(descending=True, stable=True)
    return split[0][order], split[1][order]


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Accuracy in percent."""
    was_training = model.training
    model.eval()
    parts = zip(split[0].split(CHUNK), split[1].split(CHUNK), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    model.train(was_training)
    return 100 * right / len(split[1])


def encoder(
    name: str,
    model: Path,
    data: Path,
    *,
    longest: int,
    held_out: tuple[int, int],
    **options: Any,
) -> Setting:
    """A setting with the texts in ``data/name`` and the checkpoint in `model`.

    Args:
        name: name of the setting, and of the folder in `data`.
        model: a folder that AutoModelForSequenceClassification and AutoTokenizer can load.
        data: folder of the texts; see `corpora.read`.
        longest: texts with more tokens are omitted.
        held_out: numbers of validation and test texts in each domain; all others are for training.
        options: further arguments of `Setting`.

    Raises:
        ValueError: A folder or file has the wrong form, or a domain has too few texts.
    """
    from transformers import AutoTokenizer

    if not (model / "config.json").is_file():
        raise ValueError(f"--model must be the folder of a transformers checkpoint; {model} has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = corpora.read(data / name)
    labels = sorted({sentence.label for sentences in texts.values() for sentence in sentences})
    domains = {}
    for domain, sentences in texts.items():
        rows = tokenizer([sentence.text for sentence in sentences]).input_ids
        tokens = {s: row for s, row in zip(sentences, rows, strict=True) if len(row) <= longest}
        if len(tokens) < (least := 3 * sum(held_out) // 2):
            raise ValueError(f"{domain} must have {least} texts of at most {longest} tokens; it has {len(tokens)}")
        parts = corpora.split(list(tokens), held_out)
        validation, test, train = (_tensors(part, tokens, labels) for part in parts)
        digest = corpora.digest(sentences)
        domains[domain] = Domain(train, by_length(validation), by_length(test), digest)

    def pretrained(steps: int = 0) -> nn.Module:
        return load(model, len(labels))[0]

    head = load(model, len(labels))[1]
    return Setting(
        name, "accuracy %", pretrained, domains, accuracy, trainable=head, lengths=lengths, **options,
    )  # fmt: skip


def digest(model: Path) -> str:
    """A hash of the checkpoint's weights, twelve hexadecimal digits."""
    made = hashlib.sha256()
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        made.update(path.read_bytes())
    return made.hexdigest()[:12]


def load(model: Path, labels: int) -> tuple[nn.Module, list[str]]:
    """The checkpoint without dropout and with a new head (fixed seed), and the names of the head's modules."""
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    made, told = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=labels, output_loading_info=True, dtype=torch.float32
    )
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # drawing dropout masks takes an eighth of a step on a CPU
    head = sorted({f"model.{key.rpartition('.')[0]}" for key in told["missing_keys"]})
    return Encoder(made).eval(), head


def _tensors(sentences: Sequence[Sentence], tokens: dict[Sentence, list[int]], labels: list[str]) -> Split:
    rows = [torch.tensor(tokens[sentence]) for sentence in sentences]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return padded, torch.tensor([labels.index(sentence.label) for sentence in sentences])


def few(split: Split, shots: int, seed: int) -> Split:
    """A random choice of `shots` texts per label."""
    order = torch.randperm(len(split[1]), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[split[1][order] == label][:shots] for label in split[1].unique()])
    return split[0][chosen], split[1][chosen]
