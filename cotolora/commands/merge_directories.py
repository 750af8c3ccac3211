"""``python -m cotolora merge A B --by METHOD --out DIR``: one adapter out of several directories, without a model."""

from __future__ import annotations

import argparse
import inspect
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cotolora.commands.arguments import Parser, one_line, path
from cotolora.merging import AdapterState, align, dare, fuse, lego, mix, ties
from cotolora.merging.combining import checked_states
from cotolora.saving.files import CONFIG, WEIGHTS

METHODS: dict[str, Callable[..., AdapterState]] = {"ties": ties, "mix": mix, "fuse": fuse, "lego": lego, "dare": dare}
_DESCRIPTION = """\
Merges adapters of one base model that cotolora or PEFT saved. The result is plain LoRA, which both load. It is written
whole or not at all."""
_EPILOG = """\
example: python -m cotolora merge math code --by ties --density 0.3 --weights 1,0.5 --out both.
What a method and its options compute stands in `help(cotolora.merging.ties)` and so on. Exit status: 0; 1 if the
directories are refused; 2 if an argument is wrong."""


def _weights(text: str) -> list[float]:
    try:
        return [float(weight) for weight in text.split(",")]
    except ValueError:
        must = "must be numbers with commas between, such as 0.7,0.3"
        raise argparse.ArgumentTypeError(f"{must}; got {text!r}") from None


# by the names of the functions' arguments
_OPTIONS: dict[str, dict[str, Any]] = {
    "weights": {
        "type": _weights,
        "metavar": "W,W",
        "help": "a number for each directory; --weights=-1,2 if negative",
    },
    "density": {"type": float, "metavar": "SHARE", "help": "share of the entries that stay, in (0, 1]"},
    "drop": {"type": float, "metavar": "P", "help": "probability that an entry becomes zero, in [0, 1)"},
    "of": {"choices": ("factors", "products"), "help": "what is merged entry by entry"},
    "rank": {"type": int, "metavar": "R", "help": "of the result; of ties and dare with --of products"},
    "seed": {"type": int, "metavar": "N", "help": "of the random draws"},
    "reweight": {"flag": "--no-reweight", "action": "store_false", "help": "leave out the paper's two corrections"},
}


def _parameters(method: str) -> dict[str, inspect.Parameter]:
    """The arguments of a method's function by name, but for the states."""
    return {name: p for name, p in inspect.signature(METHODS[method]).parameters.items() if name != "states"}


def add_to(commands: Any) -> None:
    """Adds the command to the parser's."""
    parser: Parser = commands.add_parser(
        "merge", help="merge adapter directories into one", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("directories", nargs="+", type=path, metavar="DIR", help="two or more directories of adapters")
    parser.add_argument("--by", required=True, choices=METHODS, help="the method")
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="directory to write the result into")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter that --out holds")
    for name, settings in _OPTIONS.items():
        of = {method: _parameters(method)[name].default for method in METHODS if name in _parameters(method)}
        defaults = {f"; {default} by default" for default in of.values() if isinstance(default, (float, str))}
        text = f"{settings['help']} ({', '.join(of)}{''.join(defaults)})"
        settings = {"dest": name, "default": None, **settings, "help": text}
        parser.add_argument(settings.pop("flag", f"--{name}"), **settings)
    parser.add_argument(
        "--align", action="store_true", help="give each directory the basis that fits the first one's, LoRA* (fuse)"
    )
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Merges, writes, and says what was written."""
    given = _checked(options)
    holds = [name for name in (CONFIG, WEIGHTS, "adapter_model.bin") if os.path.lexists(options.out / name)]
    if holds and not options.overwrite:
        raise FileExistsError(f"--out must hold no adapter unless --overwrite is given; {options.out} holds {holds[0]}")
    if options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"--out must be a directory; got {options.out}, which is none")
    states: list[Any] = options.directories
    if options.align:
        first, *others = checked_states(states, None)[0]
        states = [first, *(align(other, onto=first) for other in others)]
    try:
        state = METHODS[options.by](states, **given)
    except ValueError as error:
        if str(error).startswith(tuple(f"{name} " for name in given)):
            options.parser.error(f"argument --{error}")
        raise
    _save(state, options.out)
    print(one_line(f"{options.out}: {options.by} of {len(states)} directories, {state!r}"))
    return 0


def _checked(options: argparse.Namespace) -> dict[str, Any]:
    """The options for the method's function; a wrong one ends the program."""
    if len(options.directories) < 2:
        options.parser.error(f"argument DIR: there must be two or more directories; got {options.directories[0]}")
    parameters = _parameters(options.by)
    given = {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}
    if strange := [name for name in given if name not in parameters]:
        flag = _OPTIONS[strange[0]].get("flag", f"--{strange[0]}")
        of = [method for method in METHODS if strange[0] in _parameters(method)]
        options.parser.error(f"{flag} goes with --by {' or '.join(of)}; got --by {options.by}")
    if options.align and options.by != "fuse":
        options.parser.error(f"--align goes with --by fuse; got --by {options.by}")
    if missing := [name for name, p in parameters.items() if p.default is p.empty and name not in given]:
        options.parser.error(f"--{missing[0]} must be given with --by {options.by}")
    if "weights" in given and len(given["weights"]) != len(options.directories):
        count = len(options.directories)
        options.parser.error(f"argument --weights: must be {count} numbers, one for each DIR; got {given['weights']}")
    return given


def _save(state: AdapterState, out: Path) -> None:
    """Writes `state` into `out`; a directory that was not there appears when it is complete."""
    if out.exists():
        return state.save(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = out.parent / f".cotolora-{secrets.token_hex(4)}.new"
    try:
        state.save(whole)
        whole.rename(out)
    except BaseException:
        shutil.rmtree(whole, ignore_errors=True)
        raise
