"""Times a Llama block and a BERT block with and without stacking the projections that share an input.

    python -m benchmarks stack [--widths 64 128 256 768] [--rows 394] [--rank 8] [--rounds 40] [--json F]

Times cover whole blocks of transformers (attention, norms and activations included), forward and backward. The
unstacked block is timed twice, under two names, which shows the noise of a ratio. Before timing, the errors of stacked
and unstacked results against float64 are compared.

The second table counts the launches and bytes of the groups of a Llama-3-8B on 8192 rows in bfloat16, as `launches`
does: with addmm, with device gates, and, unless TRITON_INTERPRET is set, with the fused kernels.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from triton import knobs

import cotolora
from benchmarks import clock, launches, report
from benchmarks.report import Result
from benchmarks.shapes import number
from benchmarks.sweep import DTYPES, device_of
from benchmarks.workload import SLACK, RefusedError, error
from cotolora.results import rounded

FROZEN, SINGLE, STACKED, AGAIN = "frozen", "unstacked", "stacked", "unstacked again"
COUNTED = torch.bfloat16
GROUPS = {"q, k and v": [4096, 1024, 1024], "gate and up": [14336, 14336]}  # out_features


def llama(width: int) -> tuple[nn.Module, list[list[str]]]:
    """A block with four query heads per key head, and the groups of linears that can be stacked."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=width, intermediate_size=8 * width // 3 // 16 * 16, num_attention_heads=8, num_key_value_heads=2,
        attn_implementation="sdpa",
    )  # fmt: skip

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1], device=x.device)[None]
            return self.layer(x, position_embeddings=self.rotary(x, positions))

    return Block(), [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def bert(width: int) -> tuple[nn.Module, list[list[str]]]:
    """A block, and the groups of linears that can be stacked."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return BertLayer(config), [["query", "key", "value"]]


BLOCKS: dict[str, Callable[[int], tuple[nn.Module, list[list[str]]]]] = {"llama": llama, "bert": bert}


def results(block: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    x = x.detach().requires_grad_()
    output = block(x)
    output = output if isinstance(output, Tensor) else output[0]
    output.square().mean().backward()
    found = [output.detach(), x.grad, *[p.grad for p in cotolora.adapter_parameters(block)]]
    block.zero_grad()
    return [t for t in found if t is not None]


def measure(name: str, width: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender; raises RefusedError if stacked results are less accurate."""
    torch.manual_seed(0)
    block, groups = BLOCKS[name](width)
    for layer in cotolora.inject(block.to(options.device), rank=options.rank).values():
        nn.init.normal_(layer.lora_b, std=0.01)
    x = torch.randn(2, options.rows // 2, width, device=options.device)
    truth = results(copy.deepcopy(block).double(), x.double())
    dtype = getattr(torch, options.dtype)
    for p in block.parameters():
        p.data = p.data.to(dtype) if not p.requires_grad else p.data
    x = x.to(dtype).requires_grad_()
    blocks = {SINGLE: block, STACKED: copy.deepcopy(block), AGAIN: copy.deepcopy(block)}
    cotolora.stack(blocks[STACKED], groups)
    errors = {who: error(results(one, x), truth) for who, one in blocks.items()}
    if errors[STACKED] > SLACK * errors[SINGLE]:
        raise RefusedError(f"the error of {name}, width {width}, is {errors[STACKED]:.1e} and not {errors[SINGLE]:.1e}")
    clocks = {who: clock.eager([lambda one=one: results(one, x)], x.device) for who, one in blocks.items()}
    seconds = clock.take_turns(clocks, options.rounds)
    return [
        {
            "contender": who, "block": name, "width": width, "seconds": clock.median(seconds[who]).median,
            "over_single": clock.median([a / b for a, b in zip(seconds[who], seconds[SINGLE], strict=True)]).median,
        }
        for who in blocks
    ]  # fmt: skip


class Group(nn.Module):
    """Linears that share an input."""

    def __init__(self, features: int, sizes: list[int]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(features, n, bias=False, device="meta", dtype=COUNTED) for n in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The output of each linear."""
        return [linear(x) for linear in self.linears]


WAYS = {  # backend, and whether every gate is a tensor on the device
    "addmm": ("addmm", False), "addmm, device gates": ("addmm", True), "low_rank_gemm": ("triton:low_rank_gemm", False),
    "low_rank_gemm, device gates": ("triton:low_rank_gemm", True), "pre_expand": ("triton:pre_expand", False),
}  # fmt: skip


def counted(name: str) -> list[dict[str, Any]]:
    """Launches and bytes of a group in forward and backward: frozen, and unstacked and stacked in every way."""
    rows = [_count(name, FROZEN, "addmm", False, False)]
    for way, (backend, gated) in WAYS.items():
        if backend != "addmm" and knobs.runtime.interpret:
            continue  # kernels that are interpreted are never launched
        for who in (SINGLE, STACKED):
            rows.append(_count(name, f"{way}, {who}", backend, gated, who == STACKED))
    return rows


def _count(name: str, who: str, backend: str, gated: bool, stacked: bool) -> dict[str, Any]:
    features, sizes = 4096, GROUPS[name]
    group = Group(features, sizes).requires_grad_(False)
    for layer in cotolora.inject(group, rank=16).values() if who != FROZEN else ():
        layer.lora_a.data, layer.lora_b.data = layer.lora_a.to(COUNTED), layer.lora_b.to(COUNTED)
        if gated:
            layer.gate = torch.ones((), dtype=torch.int32, device="meta")
    if stacked:
        cotolora.stack(group, [[f"linears.{i}" for i in range(len(sizes))]])
    x = torch.empty(8192, features, device="meta", dtype=COUNTED, requires_grad=True)
    with launches.as_on_gpu(), cotolora.set_backend(backend), launches.Counter(x) as counter:
        ys = group(x)
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
    moved = launches.bytes_of(counter.kernels)
    return {"contender": who, "group": name, "launches": len(counter.kernels), "bytes": moved}


def count_table(result: Result) -> str:
    """The table of counts."""
    lines = []
    for name, rows in report.groups([row for row in result.rows if "group" in row], ["group"]).items():
        frozen = rows[0]["bytes"]
        lines += [
            [f"{name[0]}, {row['contender']}", f"{row['launches']}", f"{(row['bytes'] - frozen) / 1e6:.0f}"]
            for row in rows
        ]
    return report.markdown(["group", "launches", "MB over frozen's"], lines)


def text(result: Result) -> str:
    """The printed report."""
    lines = []
    timed = [row for row in result.rows if "block" in row]
    for (name, width), rows in report.groups(timed, ["block", "width"]).items():
        by_who = {row["contender"]: row for row in rows}
        ratios = [report.ratio(by_who[who]["over_single"]) for who in (STACKED, AGAIN)]
        lines.append([name, f"{width}", report.duration(by_who[SINGLE]["seconds"]), *ratios])
    titles = ["block", "width", "unstacked", "stacked / unstacked", "unstacked again / unstacked"]
    return "\n".join([report.head(result), report.markdown(titles, lines), "", count_table(result)])


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; raises RefusedError if stacked results are less accurate."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks stack", description=__doc__, formatter_class=formatter)
    on_gpu = torch.cuda.is_available()
    widths = [1024, 2048, 4096] if on_gpu else [64, 128, 256, 768]
    parser.add_argument("--device", type=device_of, default=device_of("cuda" if on_gpu else "cpu"))
    parser.add_argument("--widths", type=number(int), nargs="+", default=widths, help="features of x")
    parser.add_argument("--rows", type=number(int), default=8192 if on_gpu else 394, help="rows of x, an even number")
    parser.add_argument("--rank", type=number(int), default=16 if on_gpu else 8, help="rank of the adapters")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32", help="dtype of x and W")
    parser.add_argument("--rounds", type=number(int), default=40, help="measurements of each contender")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the result to this file")
    options = parser.parse_args(arguments)
    settings = {name: getattr(options, name) for name in ("widths", "rows", "rank", "dtype", "rounds")}
    result = Result("stack", report.machine(options.device), settings)
    for name in BLOCKS:
        for width in options.widths:
            result.rows += [rounded(row) for row in measure(name, width, options)]
    result.rows += [row for name in GROUPS for row in counted(name)]
    print(text(result))
    if options.json:
        report.write(options.json, result)
    return 0
