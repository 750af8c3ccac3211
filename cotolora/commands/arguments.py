"""Arguments of the commands, and what is printed where they or the files are wrong: one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage, and exits with status 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Takes no unknown argument: of a command's, that command is to say so."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Prints `message` after the name of the command."""
        self.exit(2, self.line(message) + "\n")

    def line(self, message: str) -> str:
        """`message` as an error of this command, in one line."""
        return f"{self.prog}: error: {one_line(message)}"


def path(text: str) -> Path:
    """An argument that is a path; one that is empty, such as of a variable that is not set, is no path."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path; got an empty text")
    return Path(text)


def one_line(text: str) -> str:
    r"""`text` without line breaks, and with escapes for other characters that are not printable.

    Names in the files of others may hold any.

    >>> one_line("one\n  line \x1b[2J")
    'one line \\x1b[2J'
    """
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
