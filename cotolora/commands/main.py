"""The command line: which command runs, and its exit status."""

from __future__ import annotations

import argparse
import os
import sys

from cotolora.commands import inspect_directory, merge_directories, report
from cotolora.commands.arguments import Parser

_EPILOG = "Each command has a --help of its own. Exit status: 0; 1 if files are refused; 2 if an argument is wrong."


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status; see ``--help``.

    Raises:
        SystemExit: an argument is wrong (status 2), or ``--help`` was asked for (0).
    """
    for stream in (sys.stdout, sys.stderr):  # names in files may have characters that the terminal lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = _parsed(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(options.parser.line("interrupted"), file=sys.stderr)
        return 130  # as a shell reports the signal
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        print(options.parser.line(str(error) or type(error).__name__), file=sys.stderr)
        return 1


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m cotolora", epilog=_EPILOG,
        description="Without a command: versions, the device, and which backend runs a typical layer there.",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="every dtype, with its kernels, and why not the others")
    parser.set_defaults(run=report.run, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="{inspect,merge}")
    for command in (inspect_directory, merge_directories):
        command.add_to(commands)
    return parser.parse_args(arguments)
