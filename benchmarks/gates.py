"""Times a layer whose gate is off, and counts the graphs that torch.compile compiles as gates change.

    python -m benchmarks gates [--shapes llama3-8b] [--rows 16 8192] [--rank 16] [--mode graph] [--json F] [--plot F]

A host gate is a Python bool: when it is off, the layer calls only the frozen linear and should take the same time. A
device gate is a tensor: when it is off, the kernel reads a zero from memory. Graphs are counted over 50 steps of a
CoTo run on 8 blocks, compiled as one model or block by block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import cotolora
from benchmarks import block, linear, report, sweep
from benchmarks.contenders import AUTO, FROZEN, OFF_BY_HOST, ON_BY_DEVICE, PEFT_OFF, off_by_device
from benchmarks.report import Result

DEFAULTS = {
    "cuda": {"shapes": ["llama3-8b"], "rows": [16, 8192], "peers": ["peft"]},
    "cpu": {"shapes": ["64,256,256", "394,768,768", "394,768,3072"], "rows": [], "peers": ["peft"]},
}
plot = block.plot
STEPS, WIDTH = 50, 32
COMPILED = {"the model, host gates": "host", "the model, device gates": "device", "every block, host gates": "host"}


class Block(nn.Module):
    """A residual block of two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x + down(gelu(up(x)))``."""
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Eight blocks, each gated separately by CoTo."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the blocks in sequence."""
        for layer in self.layers:
            x = layer(x)
        return x


def graphs(what: str) -> int:
    """Number of graphs compiled in `STEPS` steps of a CoTo run; beyond torch's limit of 8 the code runs eagerly."""
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    torch.manual_seed(0)
    model, counter = Model(), CompileCounter()
    cotolora.inject(model, rank=4)
    coto = cotolora.CoTo(model, STEPS, gates=COMPILED[what])
    if what.startswith("every block"):
        for block in model.layers:
            block.compile(backend=counter)
    compiled = torch.compile(model, backend=counter) if what.startswith("the model") else model
    for _ in range(STEPS):
        compiled(torch.randn(4, WIDTH)).sum().backward()
        coto.step()
    torch.compiler.reset()
    return counter.frame_count


def graph_table(result: Result) -> str:
    """The table of graph counts."""
    lines = [[row["contender"], str(row["graphs"])] for row in result.rows if "graphs" in row]
    return report.markdown([f"graphs over {STEPS} masks", "compiled"], lines)


def text(result: Result) -> str:
    """The printed report: tables of times and graph counts."""
    timed = Result(**{**vars(result), "rows": [row for row in result.rows if "graphs" not in row], "notes": []})
    return "\n".join([sweep.text(timed), "", graph_table(result), "", *(f"- {note}" for note in result.notes)])


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for every shape, then the graph counts; returns 1 if a check fails."""
    parser = sweep.parser_of("gates", __doc__ or "", peers=("peft",))  # the only peer that can switch adapters off
    linear.add_shapes(parser)
    options = sweep.settle(parser, arguments, DEFAULTS)
    peers = [PEFT_OFF] if "peft" in options.peers else []
    contenders = [FROZEN, AUTO, ON_BY_DEVICE, OFF_BY_HOST, *off_by_device(options.variant), *peers]
    result = Result("gates", report.machine(options.device), sweep.settings_of(options))
    sweep.measure(result, options, linear.cases(options.shapes, options.rows), contenders)
    result.rows += [{"contender": what, "graphs": graphs(what)} for what in COMPILED]
    print("\n".join([sweep.endings(result), "", graph_table(result)]), flush=True)
    return sweep.finish(result, options, plot)
