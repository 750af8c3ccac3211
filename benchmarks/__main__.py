"""`python -m benchmarks NAME …` runs one of the measurements."""

from __future__ import annotations

import importlib
import sys

# each is a module of this package whose main(arguments) returns the exit status
COMMANDS = {
    "aot": "compile every kernel for every GPU it has tiles for, without a GPU, and hold it to its budget",
    "block": "times all linears of a Llama's or a vision transformer's block: ours beside frozen and every peer",
    "gates": "times a gate that is off, by host and by device, and counts the graphs of changing gates",
    "host": "times what one low-rank linear costs the host: ours in every form beside frozen and PEFT's order",
    "launches": "count what a layer launches, moves and saves: ours, PEFT's and Unsloth's order of operations",
    "linear": "times one low-rank linear: ours in every form beside frozen and every peer",
    "memory": "what a block's linears keep for the backward and hold at most: ours beside frozen and every peer",
    "models": "tries every architecture of transformers and timm: inject, CoTo, save, load, merge, against PEFT",
    "roofline": "times one low-rank linear beside what this machine's memory and products allow, and what is modelled",
    "shapley": "times Shapley values with many coalitions in one forward beside one coalition a forward",
    "show": "prints measurements from their JSON",
    "stack": "times whole blocks of a Llama and a BERT whose projections of one x are stacked beside unstacked",
    "study": "checks the paper's claims on a pretrained encoder, digits and text: task, fusing, pruning, merging, time",
    "train": "times whole training steps of a small Llama over a CoTo run: PEFT, ours always on, ours with CoTo",
    "variants": "times DoRA and HiRA: ours beside PEFT's and our own LoRA, and what each holds at most",
    "tune": 'time every form of a low-rank layer on this GPU and keep the table that backend="auto" chooses by',
}


def main(arguments: list[str]) -> int:
    """Runs the command named first with the rest of the arguments."""
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    print("usage: python -m benchmarks NAME ...\n")
    print("\n".join(f"  {name:14} {what}" for name, what in COMMANDS.items()))
    return 0 if arguments in ([], ["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
