"""The Markdown pages: their links, the files they name, their commands, and the code that they quote."""

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.repository import ROOT, pages

FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.M | re.S)
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\n).)+?)(?<!`)\1(?!`)", re.S)
SHELL = ("", "bash", "console", "sh", "shell")
FOLDERS = ("benchmarks", "cotolora", "kernels", "tests", ".ci")
# of pytest, those that take the next word
VALUED = ("-n", "-k", "-m", "-p", "--dist")
PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


class Parsed(BaseException):
    """Raised where a command has read its arguments, before it does anything."""


class Command(NamedTuple):
    """What a page tells its reader to run.

    Attributes:
        words: without variables of the environment before it.
        shown: whether it stands in a block of its own; else a sentence mentions it, perhaps by its name alone.
    """

    words: list[str]
    shown: bool


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each code block."""
    return FENCE.findall(page.read_text())


@cache
def prose(page: Path) -> str:
    """What is in no code block."""
    return FENCE.sub("", page.read_text())


@cache
def spans(page: Path) -> list[str]:
    """The code within sentences and tables, each in one line."""
    return [" ".join(text.split()) for _, text in SPAN.findall(prose(page))]


def links(page: Path) -> Iterator[str]:
    """Where the links and pictures of a page lead, but for those to other sites."""
    text = SPAN.sub("", prose(page))
    found = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.M)
    found += re.findall(r"<(?:a|img)\b[^>]*?(?:href|src)=\"([^\"]+)\"", text)
    return (target for target in found if not re.match(r"[a-z]+:", target))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        same = (f"{slug}-{i}" for i in range(1, 99))
        found.add(slug if slug not in found else next(other for other in same if other not in found))
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", prose(page)))


def commands(page: Path) -> Iterator[Command]:
    """Every command of a page, in blocks and in sentences."""
    lines = [line for language, text in blocks(page) if language in SHELL for line in joined(text).splitlines()]
    for text, shown in [*((line, True) for line in lines), *((span, False) for span in spans(page))]:
        if not re.search(r"python3? -m |pytest", text):
            continue
        # of alternatives the first; of what may be left out, all; no ellipses
        text = re.sub(r"(\w)(?:\|[\w-]+)+", r"\1", text)
        text = re.sub(r"(?<![\w\"'])\[|\](?![\w\"'])|…|\.\.\.", " ", text)
        words: list[str] = []
        lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if not re.fullmatch(r"[();<>|&]+", word):
                words.append(word)
                continue
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words:
                yield Command(words, shown)
            words = []


def joined(text: str) -> str:
    """With the lines that end in a backslash continued."""
    return re.sub(r"\\\n\s*", "", text)


def refusal(module: str, arguments: list[str], monkeypatch) -> str | None:
    """What a module's parser says of its arguments, None where it takes them. Runs nothing else that has a parser."""

    def parse(self, *given, **options):
        parse_args(self, *given, **options)
        raise Parsed

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore", RuntimeWarning)  # a test has imported the module before
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Parsed:
        return None
    except SystemExit as end:
        return said.getvalue() if end.code else None
    except ImportError as error:
        return str(error)
    return f"{module} takes no arguments" if arguments else None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_what_exists(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / name)) if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), f"{link}: there are {sorted(anchors(target))}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    code = [*spans(page), *(text for _, text in blocks(page))]
    folders = "|".join(re.escape(folder) for folder in FOLDERS)
    for name in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./*-]*)", "\n".join(code)):
        assert any(list(folder.glob(name.rstrip("./"))) for folder in (ROOT, page.parent)), name
    for name in (span for span in spans(page) if re.fullmatch(r"[\w/]+\.py", span)):
        assert (ROOT / name).exists() or any(str(path).endswith(f"/{name}") for path in SOURCES), name


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_repository_exist_and_take_their_options(page, monkeypatch):
    for words, shown in commands(page):
        if words[0] not in ("python", "python3") or words[1:2] != ["-m"]:
            continue
        module, *arguments = words[2:]
        if module.split(".")[0] not in FOLDERS or arguments[:1] == ["NAME"]:
            continue
        with monkeypatch.context() as patch:
            said = refusal(module, arguments, patch)
        # `python -m benchmarks show`, as a name, has no files
        named = not shown and len(arguments) < 2 and "the following arguments are required" in (said or "")
        assert said is None or named, f"{shlex.join(words)}: {said}"


@pytest.mark.parametrize("page", PAGES)
def test_what_pytest_is_given_exists(page):
    markers = re.findall(r'^ +"(\w+): ', (ROOT / "pyproject.toml").read_text(), re.M)
    for words, _ in commands(page):
        arguments = words[1:] if words[0] == "pytest" else words[3:] if words[1:3] == ["-m", "pytest"] else []
        for before, word in zip([None, *arguments], arguments, strict=False):
            if before == "-m":
                assert set(re.findall(r"\w+", word)) - {"and", "or", "not"} <= set(markers), word
            elif before not in VALUED and not word.startswith("-") and not word.isupper():
                file, *names = word.split("::")
                assert (ROOT / file).exists(), word
                assert all(f" {name}(" in (ROOT / file).read_text() for name in names), word


def test_the_examples_of_style_are_our_own_code():
    """Each names its file first; a line of three dots leaves lines out."""
    examples = [text for language, text in blocks(ROOT / "CONTRIBUTING.md") if language == "python"]
    assert examples
    for example in examples:
        first, _, rest = example.partition("\n")
        source = stripped((ROOT / first.removeprefix("# ")).read_text())
        for part in re.split(r"^\s*\.\.\.\n", rest, flags=re.M):
            assert stripped(part) in source, f"{first}: {part}"


def stripped(text: str) -> str:
    """Lines without what is around them, and without empty ones."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def test_the_readme_is_read_in_five_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1000  # as `wc -w` counts
    assert len(text.splitlines()) <= 150
