"""A small Llama with adapters from PEFT or from cotolora, ready to train and checked against PEFT in float64.

All contenders share the frozen weights and see the same tokens. Each has its own optimizer and its own copy of A and B,
with equal values.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import cotolora
from benchmarks.workload import SCALE, SLACK, UPDATE, RefusedError, error

PEFT, NARROW, ON, COTO = "PEFT as shipped", "PEFT, A and B in x's dtype", "ours, always on", "ours with CoTo"
PHASES = ("forward", "backward", "optimizer")
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Size:
    """Sizes of a Llama with grouped-query attention, and of its batches."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    tokens: int


SIZES = {
    "small": Size(8, 256, 688, heads=8, kv_heads=2, vocab=512, batch=4, tokens=64),
    "medium": Size(16, 1024, 2816, heads=16, kv_heads=4, vocab=4096, batch=8, tokens=512),
    # only a few blocks: the full models are too large to measure
    "llama3-8b": Size(4, 4096, 14336, heads=32, kv_heads=8, vocab=4096, batch=2, tokens=1024),
    "llama2-7b": Size(4, 4096, 11008, heads=32, kv_heads=32, vocab=4096, batch=2, tokens=1024),
}


@dataclass(frozen=True)
class Adapter:
    """A and B of one linear, and a function that tells whether they are on."""

    a: nn.Parameter
    b: nn.Parameter
    on: Callable[[], bool]

    @property
    def work(self) -> int:
        """Multiply-adds per row of x."""
        return self.a.numel() + self.b.numel()


class Runner:
    """A contender: its model, its adapters by the name of their linear, its optimizer and its CoTo, if any."""

    def __init__(
        self, name: str, model: nn.Module, adapters: dict[str, Adapter], coto: cotolora.CoTo | None = None
    ) -> None:
        self.name, self.model, self.adapters, self.coto = name, model, adapters, coto
        parameters = [t for adapter in adapters.values() for t in (adapter.a, adapter.b)]
        self.device = parameters[0].device
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
        if coto is not None:
            coto.attach(self.optimizer)
        self.blocks = blocks_of(model)
        self.backwards = 0
        for block in self.blocks:
            block.register_forward_hook(self._watch)

    def _watch(self, block: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(self._count)

    def _count(self, grad: Tensor) -> None:
        self.backwards += 1

    def take(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Copies values into A and B; raises RefusedError if the adapters are on other linears than PEFT's."""
        if set(factors) != set(self.adapters):
            raise RefusedError(f"adapters differ from PEFT's at {sorted(set(factors) ^ set(self.adapters))}")
        with torch.no_grad():
            for name, (a, b) in factors.items():
                self.adapters[name].a.copy_(a)
                self.adapters[name].b.copy_(b)

    def forward(self, tokens: Tensor) -> Tensor:
        """The next-token prediction loss."""
        return self.model(input_ids=tokens, labels=tokens).loss

    def step(self, tokens: Tensor) -> tuple[float, ...]:
        """Runs one optimizer step; returns its seconds and those of each of `PHASES`."""
        watch = Watch(self.device)
        loss = self.forward(tokens)
        watch.mark()
        loss.backward()
        watch.mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.coto is not None:
            self.coto.step()
        watch.mark()
        return watch.seconds()

    def results(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The loss, and the gradients of A and B by name."""
        loss = self.forward(tokens)
        loss.backward()
        grads = {
            f"{part} of {name}": t.grad
            for name, adapter in self.adapters.items()
            for part, t in (("A", adapter.a), ("B", adapter.b))
        }
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), grads


class Watch:
    """Times a step and its phases.

    On a GPU, phases are timed by CUDA events and the whole step by the wall clock up to a synchronize.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, list[Any]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.start = time.perf_counter()
        self.mark()

    def mark(self) -> None:
        """Ends a phase."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        """Seconds of the whole step, then of each phase."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter() - self.start, *(a.elapsed_time(b) / 1e3 for a, b in pairs)
        return self.marks[-1] - self.marks[0], *(b - a for a, b in pairs)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a Llama, also of a wrapped one."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


def llama(options: argparse.Namespace) -> nn.Module:
    """A frozen Llama of the requested size with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[options.size]
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        max_position_embeddings=options.tokens,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config).to(options.device).train().requires_grad_(False)
    for parameter in model.parameters():
        # not .to(dtype), which would also round the buffers of the rotary embedding
        parameter.data = parameter.data.to(getattr(torch, options.dtype))
    return model


def sharing(base: nn.Module) -> nn.Module:
    """A copy of the model that shares its parameters."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def peft(name: str, base: nn.Module, options: argparse.Namespace, *, as_shipped: bool = True) -> Runner:
    """PEFT's LoRA on all linears but the head; A and B are float32 if `as_shipped`, otherwise of the base's dtype."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=options.rank, lora_alpha=SCALE * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # PEFT 0.21 uses a name of transformers that transformers 5 deprecates
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(sharing(base), config, autocast_adapter_dtype=as_shipped)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    adapters = {
        name: Adapter(layer.lora_A["default"].weight, layer.lora_B["default"].weight, partial(enabled, layer))
        for name, layer in layers.items()
    }
    return Runner(name, model, adapters)


def enabled(layer: Any) -> bool:
    """Whether PEFT's layer computes its adapter."""
    return not layer.disable_adapters


def ours(name: str, base: nn.Module, options: argparse.Namespace, *, coto: bool = False) -> Runner:
    """Our layers on the same linears, with every adapter always on or gated by CoTo."""
    model = sharing(base)
    layers = cotolora.inject(model, "all-linear", rank=options.rank, alpha=SCALE * options.rank)
    adapters = {name: Adapter(x.lora_a, x.lora_b, partial(counts, x)) for name, x in layers.items()}
    strategy = cotolora.CoTo(model, options.steps, seed=options.seed, gates="host") if coto else None
    return Runner(name, model, adapters, strategy)


def counts(layer: cotolora.CoToLoRALinear) -> bool:
    """Whether our layer computes its adapter."""
    return layer.active is not False


Build = Callable[[str, nn.Module, argparse.Namespace], Runner]


def contenders_of(options: argparse.Namespace) -> dict[str, Build]:
    """The contenders; only one form of PEFT for float32, where both are the same."""
    narrow = {} if options.dtype == "float32" else {NARROW: partial(peft, as_shipped=False)}
    peers = {PEFT: peft, **narrow} if "peft" in options.peers else {}
    return {**peers, ON: ours, COTO: partial(ours, coto=True)}


def factors_of(runner: Runner, dtype: torch.dtype, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Nonzero A and B for every linear, rounded to `dtype` so that all contenders have the same values."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    factors = {}
    for name, adapter in runner.adapters.items():
        a = draw(adapter.a.shape) / math.sqrt(adapter.a.shape[1])
        b = draw(adapter.b.shape) * (UPDATE / SCALE / math.sqrt(adapter.a.shape[0]))
        factors[name] = (a.to(dtype).float(), b.to(dtype).float())
    return factors


def tokens_of(options: argparse.Namespace, step: int) -> Tensor:
    """The batch of a step: random tokens, the same for every contender."""
    draw = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    size = (options.batch, options.tokens)
    return torch.randint(options.vocab, size, generator=draw).to(options.device)


class Judge:
    """Compares contenders with PEFT in float64.

    The tolerance is `SLACK` times the error of PEFT as shipped in the dtype to be timed.
    """

    def __init__(self, base: nn.Module, options: argparse.Namespace) -> None:
        self.truth, self.own = peft("truth", copy.deepcopy(base).double(), options), peft(PEFT, base, options)
        self.factors = factors_of(self.own, getattr(torch, options.dtype), options.seed)
        self.truth.take(self.factors)
        self.own.take(self.factors)
        self.tokens, self.eps = tokens_of(options, 0), torch.finfo(getattr(torch, options.dtype)).eps

    def check(self, runner: Runner) -> None:
        """Raises RefusedError if a loss or gradient is wrong; checks CoTo with the masks of mid-ramp and of step 0."""
        runner.take(self.factors)
        if runner.coto is None:
            self.compare(runner)
            return
        total = runner.coto.state_dict()["total_steps"]
        for step in (total * 3 // 8, 0):
            runner.coto.set_step(step)
            self.compare(runner)

    def compare(self, runner: Runner) -> None:
        """Raises RefusedError if a loss or a gradient is wrong with the adapters switched as they are now."""
        for judge in (self.truth, self.own):
            switch(judge, {name for name, adapter in runner.adapters.items() if adapter.on()})
        true, own, found = (one.results(self.tokens) for one in (self.truth, self.own, runner))
        for name, grad in found[1].items():
            if (grad is None) != (true[1][name] is None):
                raise RefusedError(f"gives {'no' if grad is None else 'a'} gradient of {name}, PEFT does the opposite")
        self.hold("the loss", [found[0]], [own[0]], [true[0]])
        names = [name for name, grad in true[1].items() if grad is not None]
        self.hold("a gradient", *([grads[name] for name in names] for _, grads in (found, own, true)))

    def hold(self, what: str, found: Sequence[Tensor], own: Sequence[Tensor], true: Sequence[Tensor]) -> None:
        """Raises RefusedError if the largest relative error (in each tensor's own norm) exceeds the tolerance."""
        worst, peft_errs = (max(error([t], [e]) for t, e in zip(ts, true, strict=True)) for ts in (found, own))
        # at most sqrt(eps), half of the digits, in case PEFT itself is less accurate
        allowed = min(SLACK * (peft_errs + self.eps), math.sqrt(self.eps))
        if not worst <= allowed:  # not `worst > allowed`, which is false for NaN
            raise RefusedError(f"{what} is off by {worst:.3g} of its norm, allowed is {allowed:.3g}")


def switch(runner: Runner, on: set[str]) -> None:
    """Switches PEFT's adapters on for these linears and off for all others."""
    for name in runner.adapters:
        layer = runner.model.get_submodule(f"base_model.model.{name}")
        layer.enable_adapters(name in on)
