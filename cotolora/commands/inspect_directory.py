"""``python -m cotolora inspect DIR``: what an adapter directory holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cotolora.commands.arguments import Parser, path
from cotolora.commands.description import described, details, measure
from cotolora.saving.contents import contents
from cotolora.saving.files import CONFIG, WEIGHTS

_DESCRIPTION = """\
Says what an adapter directory holds: method, ranks, size, norms of the updates by layer, and what load_adapter would
refuse whatever the model. It reads what cotolora and PEFT write, and of other or damaged files what can be read."""
_EPILOG = "Exit status: 0; 1 if load_adapter would refuse the directory; 2 if an argument is wrong."
_EXTRA = "--plot needs matplotlib; pip install 'cotolora[plot]'"


def add_to(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser: Parser = commands.add_parser(
        "inspect", help="what an adapter directory holds", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("directory", type=path, metavar="DIR", help=f"holds {CONFIG} and {WEIGHTS}")
    parser.add_argument(
        "--plot", type=path, metavar="FILE", help="draw the norms by layer into a .png, .svg or .pdf (needs matplotlib)"
    )
    parser.add_argument(
        "--verbose", action="store_true", default=argparse.SUPPRESS,
        help="a line for each adapter, with its rank, shape and scale, and for each other tensor",
    )  # fmt: skip
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Prints the report and draws the plot; 1 if `load_adapter` would refuse the directory."""
    directory: Path = options.directory
    draw = None if options.plot is None else _drawing(options.plot, options.parser)
    if not directory.is_dir():
        reason = "which is no directory" if directory.exists() else "which does not exist"
        raise FileNotFoundError(f"DIR must be a directory; got {directory}, {reason}")
    found = contents(directory)
    norms = measure(found)
    print("\n".join(described(directory, found, norms)))
    if options.verbose:
        print("\n".join(details(found)))
    if draw is not None:
        if norms is None:
            raise ValueError(f"--plot must have norms to draw; {directory} holds none that can be read")
        draw(norms, directory.resolve().name, options.plot)
        print(f"\nThe plot is in {options.plot}")
    return 1 if found.refusal else 0


def _drawing(file: Path, parser: Parser) -> Any:
    """What draws into `file`, once it is certain that it can."""
    try:
        from cotolora.commands import plot
    except ImportError as error:
        raise RuntimeError(f"--plot needs matplotlib, of the extra cotolora[plot]; {error}") from error
    if file.suffix.lower() not in plot.formats():
        parser.error(f"--plot must end in one of {', '.join(plot.formats())}; got {file}")
    return plot.draw
