"""Runs one of the measurements: `python -m benchmarks NAME …`."""

from __future__ import annotations

import importlib
import sys

# each is a module of this package whose main(arguments) returns the exit status
COMMANDS = {
    "aot": "compile every kernel for every target GPU, without a GPU, and check registers, spills and shared memory",
    "block": "time all linears of a Llama or vision-transformer block: cotolora, the frozen linears and every peer",
    "gates": "time a layer whose gate is off and count how often torch.compile recompiles as gates change",
    "host": "time the CPU overhead of one low-rank linear: every backend, the frozen linear and PEFT's operations",
    "launches": "count kernel launches, bytes moved and bytes saved for one layer: cotolora, PEFT and Unsloth",
    "linear": "time one low-rank linear: every backend, the frozen linear and every peer",
    "memory": "measure saved and peak memory of a block's linears: cotolora, the frozen linears and every peer",
    "models": "test every architecture of transformers and timm: inject, train, save, load and merge, against PEFT",
    "roofline": "compare the time of one low-rank linear with this machine's roofline and with the cost model",
    "shapley": "time Shapley values: many coalitions per forward pass against one coalition per forward pass",
    "show": "print saved measurements from their JSON",
    "stack": "time whole Llama and BERT blocks with and without stacking the projections that share an input",
    "study": "test the paper's claims on a pretrained encoder, digits and text: score, fusing, pruning, merging, time",
    "train": "time whole training steps of a small Llama: PEFT, cotolora always on, and cotolora with CoTo",
    "variants": "time DoRA and HiRA and measure their peak memory, against PEFT and against cotolora's LoRA",
    "tune": 'time every backend on this GPU and save the table that backend="auto" reads',
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
