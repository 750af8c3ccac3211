"""The test of one model: inject, train with CoTo, save, load and merge, in comparison with PEFT."""

from __future__ import annotations

import copy
import logging
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cotolora
from benchmarks.workload import reason
from cotolora.saving.experts import mistaken

WORKS, WARNED, REFUSED, PEFT_FAILS, WRONG, NOT_BUILT = (
    "works", "works, warned", "refused", "PEFT fails as well", "wrong", "not built",
)  # fmt: skip
OUTCOMES = (WORKS, WARNED, REFUSED, PEFT_FAILS, WRONG, NOT_BUILT)

RANK, ALPHA, STEPS = 4, 8.0, 20
# relative to the largest output: float32 rounding through a few blocks, amplified by attention and norms
TOLERANCE = 1e-4
EXCLUSIONS = 4  # how often to follow the advice of an error message and exclude a layer


@dataclass
class Subject:
    """A model in eval mode, and the keyword arguments that it is called with."""

    model: nn.Module
    inputs: dict[str, Any]


class FindingError(Exception):
    """A wrong result."""


class NotBuiltError(Exception):
    """A model cannot be built or called, or its outputs cannot be compared."""


def seed() -> None:
    """Seeds every random generator that models use."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested outputs; skips caches and other objects."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The outputs of a model without gradients, with the same random numbers each time."""
    seed()
    with torch.no_grad():
        return [t.clone() for t in tensors_in(model(**copy.deepcopy(inputs)))]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether outputs are bitwise equal; NaN equals NaN."""
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(one, other, strict=True)
    )


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest output of the same tensor; infinite if shapes or NaN differ."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        finite = a.isfinite() & b.isfinite()
        if not same([a[~finite]], [b[~finite]]):
            return float("inf")
        if finite.any():
            scale = float(b[finite].abs().max()) or 1.0
            worst = max(worst, float((a[finite].double() - b[finite].double()).abs().max()) / scale)
    return worst


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


@contextmanager
def told() -> Iterator[list[str]]:
    """Collects the warnings and errors that this library logs inside the block."""
    logger, handler = logging.getLogger("cotolora"), _Records()
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield handler.told
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class Trial:
    """Runs one model through all stages. `row` holds the results so far."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.base, self.inputs, self.folder = subject.model, subject.inputs, folder
        self.row: dict[str, Any] = {
            "parameters": sum(p.numel() for p in self.base.parameters()), "adapters": None, "peft": None,
            "difference": None,
        }  # fmt: skip
        self.exclude: list[str] = []
        self.notes: list[str] = []  # remarks that do not affect the outcome
        self.told: list[str] = []
        self.targets: list[str] = []
        self.peft_own: list[Tensor] = []

    def fresh(self) -> nn.Module:
        """A copy of the original model."""
        return copy.deepcopy(self.base)

    def of(self, model: nn.Module) -> list[Tensor]:
        """The model's outputs."""
        return outputs(model, self.inputs)

    def run(self) -> dict[str, Any]:
        """Runs all stages; returns the row of this model with outcome, stage and reason."""
        outcome, stage, why = WORKS, "", ""
        steps = {
            "forward": self.forward, "inject": self.inject, "off": self.off, "peft": self.peft, "train": self.train,
            "save": self.save, "load": self.load, "from peft": self.from_peft, "merge": self.merge,
        }  # fmt: skip
        with told() as self.told:
            for name, step in steps.items():
                try:
                    step()
                except NotBuiltError as error:
                    outcome, why = NOT_BUILT, str(error)
                except FindingError as error:
                    outcome, why = WRONG, str(error)
                except Exception as error:
                    outcome, why = self._raised(error), reason(error).replace(f"{self.folder}/", "")
                if why:
                    stage = name
                    break
        if outcome == WORKS:
            if self.exclude:
                outcome, stage, why = REFUSED, "inject", self.refusal
            elif self.told:
                outcome, why = WARNED, self.told[0][:200]
        return {**self.row, "outcome": outcome, "stage": stage, "reason": why, "warnings": len(self.told),
                "told": " | ".join(dict.fromkeys(_kind(line) for line in self.told)), "notes": "; ".join(self.notes),
                }  # fmt: skip

    def _raised(self, error: Exception) -> str:
        """The outcome for an error: "refused" if it names a layer, otherwise a fault."""
        # also the model's class: a model without linear modules has no layer to name
        names = [type(self.base).__name__, *(name for name, _ in self.base.named_parameters())]
        names += [name for name, module in self.base.named_modules() if name and list(module.parameters(recurse=False))]
        told = any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", str(error)) for name in names)
        if told and isinstance(error, (ValueError, TypeError, RuntimeError)):
            return REFUSED
        return WRONG if self.row["peft"] in (None, "equal") else PEFT_FAILS

    def forward(self) -> None:
        """Checks that the model gives the same outputs at every call."""
        # frozen, as under adapters, because torch may use other kernels for weights that require gradients
        self.base.eval().requires_grad_(False)
        self.plain = self.of(self.base)
        if not self.plain:
            raise NotBuiltError("its outputs contain no floating-point tensor")
        if not same(self.plain, self.of(self.base)):
            raise NotBuiltError("its outputs differ from call to call")
        if not all(t.isfinite().any() for t in self.plain):
            raise NotBuiltError("an output contains no finite number")
        self.keys = list(self.base.state_dict())
        self.trains = self._computed_in_training(self.base)
        if self.trains is None:
            self.notes.append("cannot be called in train mode; trained in eval mode")
        self.repeats = self.trains is not None and same(self.trains, self._computed_in_training(self.base) or [])
        if self.trains is not None and not self.repeats:
            self.notes.append("its outputs in train mode differ from call to call")

    def _computed_in_training(self, model: nn.Module) -> list[Tensor] | None:
        twin = copy.deepcopy(model).train()
        try:
            return self.of(twin)
        except Exception:
            return None

    def inject(self) -> None:
        """Checks that `inject` adapts every linear module or names those it refuses, which are then excluded."""
        self.refusal = ""
        for _ in range(EXCLUSIONS):
            try:
                self.model = self.fresh()
                before = list(self.model.state_dict())
                self.layers = cotolora.inject(self.model, rank=RANK, alpha=ALPHA, exclude=self.exclude or None)
                break
            except ValueError as error:
                if list(self.model.state_dict()) != before or not same(self.of(self.model), self.plain):
                    raise FindingError("inject raised an error but changed the model") from error
                advice = re.search(r"exclude=\['([^']+)'\]", str(error))
                if advice is None or advice[1] in self.exclude:
                    raise
                self.exclude.append(advice[1])
                self.refusal = self.refusal or reason(error)
        else:
            raise FindingError(f"still refused after excluding {self.exclude}: {self.refusal}")
        self.row["adapters"] = len(self.layers)
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        own = {f"{name}.{key}" for name in self.layers for key in ("lora_a", "lora_b")}
        if trained != own:
            raise FindingError(f"the parameters that require grad are not exactly A and B: {sorted(trained ^ own)[:4]}")
        if list(cotolora.adapters(self.model)) != list(self.layers):
            raise FindingError("adapters() returns other names than inject")

    def off(self) -> None:
        """Checks that new adapters and adapters that are off leave outputs bitwise equal, in eval and train mode."""
        if not same(self.of(self.model), self.plain):
            raise FindingError("outputs with new adapters differ from the plain model's")
        self._start()
        for layer in self.layers.values():
            layer.enabled = False
        if not same(self.of(self.model), self.plain):
            raise FindingError("outputs with adapters disabled differ from the plain model's")
        for layer in self.layers.values():
            layer.enabled, layer.gate = True, False
        if self.trains is not None:
            computed = self._computed_in_training(self.model)
            if computed is None or (self.repeats and not same(computed, self.trains)):
                raise FindingError("outputs in train mode with every gate off differ from the plain model's")
        for layer in self.layers.values():
            layer.gate = True

    def _start(self) -> None:
        seed()
        for layer in self.layers.values():
            nn.init.normal_(layer.lora_b, std=0.1)

    def peft(self) -> None:
        """Runs PEFT's adapters on the same modules and records in `row["peft"]` whether PEFT supports the model."""
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        by_weight = mistaken(self.base, self.layers)
        modules = [name for name in self.layers if name not in by_weight]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = self._by_peft_alone()
                if model is None:
                    model = self._by_peft(modules, [f"{name}.weight" for name in by_weight] or None)
                self.peft_own = self.of(model.base_model.model)
                model.save_pretrained(self.folder / "peft")
                torch.manual_seed(1)  # another seed, so that parameters that are not loaded differ
                again = PeftModel.from_pretrained(self.fresh(), self.folder / "peft").eval()
                reloaded = self.of(again.base_model.model)
        except Exception as error:
            self.row["peft"] = f"raises {reason(error)}"
            return
        if distance(reloaded, self.peft_own) > max(TOLERANCE, 10 * self.sensitivity()):
            self.row["peft"] = "gives other outputs after loading its own file"
            return
        found = model.base_model.model.named_modules()
        names = {name for name, module in found if isinstance(module, BaseTunerLayer)}
        for whose, only in (("PEFT", names - set(self.layers)), ("ours", set(self.layers) - names)):
            if only:
                self.notes.append(f"only {whose} adapts {sorted(only)[0]} and {len(only) - 1} more")
        self.row["peft"] = "equal"

    def _by_peft(self, targets: Any, parameters: list[str] | None = None) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            target_modules=targets, target_parameters=parameters, exclude_modules=self.exclude or None, r=RANK,
            lora_alpha=ALPHA, init_lora_weights=False,
        )  # fmt: skip
        seed()
        return get_peft_model(self.fresh(), config).eval()

    def _by_peft_alone(self) -> Any:
        """PEFT's model with its own "all-linear"; None (with a note) if that fails or targets parameters as well."""
        if not any(kind.__name__ == "PreTrainedModel" for kind in type(self.base).__mro__):
            return None
        try:
            model = self._by_peft("all-linear")
            self.of(model.base_model.model)
        except Exception as error:
            self.notes.append(f"PEFT's all-linear raises {reason(error)}")
            return None
        if parameters := model.peft_config["default"].target_parameters:
            # experts stored as one parameter; inject has warned that they stay frozen
            self.notes.append(f"PEFT's all-linear also adapts parameters: {', '.join(sorted(parameters))}")
            return None
        return model

    def train(self) -> None:
        """Trains with CoTo; checks that adapters that are off stay unchanged, others change, and nothing else does."""
        model, buffers = self.model, {name: b.clone() for name, b in self.model.named_buffers()}
        if self.trains is not None:
            model.train()
        else:
            for layer in self.layers.values():
                layer.train()
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        start = self._factors()
        self._let_gradients_in()
        optimizer = torch.optim.AdamW(cotolora.adapter_parameters(model), lr=1e-3, weight_decay=0.1)
        coto = cotolora.CoTo(model, STEPS)
        coto.attach(optimizer)
        seed()
        for _ in range(STEPS):
            before = self._factors()
            found = [t for t in tensors_in(model(**copy.deepcopy(self.inputs))) if t.requires_grad]
            if found:  # empty if every adapter that the outputs depend on is off
                torch.stack([t[t.isfinite()].square().mean() for t in found]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            after = self._factors()
            for name, layer in self.layers.items():
                if layer.gate is False and not same(after[name], before[name]):
                    raise FindingError(f"{name} changed although it was off")
            coto.step()
        coto.finish()
        model.eval()
        moved = [name for name, factors in self._factors().items() if not same(factors, start[name])]
        if not moved:
            raise FindingError("no adapter changed")
        for name, p in model.named_parameters():
            if name in frozen and not same([p], [frozen[name]]):
                raise FindingError(f"{name} changed although it is frozen")
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
        self.trained = self.of(model)
        if not all(t.isfinite().any() for t in self.trained):
            raise FindingError("after training, an output contains no finite number")
        self.unmoved = sorted(set(self.layers) - set(moved))
        text = " ".join(self.told)
        said, counted = set(re.findall(r"[\w.-]+", text)), sum(map(int, re.findall(r"and (\d+) more\]", text)))
        silent = [name for name in self.unmoved if name not in said]
        if len(silent) > counted:  # a long list in a warning ends with "and N more"
            raise FindingError(f"{len(silent)} adapters did not change, and no warning names {silent[0]}")

    def _let_gradients_in(self) -> None:
        """If no output requires grad (as with reversible layers), makes the outputs of the embeddings require it."""
        seed()
        if any(t.requires_grad for t in tensors_in(self.model(**copy.deepcopy(self.inputs)))):
            return
        with suppress(AttributeError, NotImplementedError):  # not a transformers model, or one without embeddings
            self.model.enable_input_require_grads()
            self.notes.append("no output requires grad without enable_input_require_grads()")

    def _factors(self) -> dict[str, list[Tensor]]:
        return {name: [layer.lora_a.detach().clone(), layer.lora_b.detach().clone()]
                for name, layer in self.layers.items()}  # fmt: skip

    def _near(self, one: Sequence[Tensor], other: Sequence[Tensor], what: str) -> None:
        error = distance(one, other)
        self.row["difference"] = max(self.row["difference"] or 0.0, error)
        if error > TOLERANCE and error > 10 * self.sensitivity():
            raise FindingError(f"{what}: a difference of {error:.1e} of the largest output")

    def sensitivity(self) -> float:
        """The change of the plain outputs when every weight has a rounding error, as with another summation order."""
        model = self.fresh()
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point():
                    p.mul_(1 + torch.finfo(p.dtype).eps * torch.randn_like(p))
        return distance(self.of(model), self.plain)

    def save(self) -> None:
        """Checks that PEFT reads our files."""
        import peft

        cotolora.save_adapter(self.model, self.folder / "ours")
        if self.row["peft"] == "equal":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = peft.PeftModel.from_pretrained(self.fresh(), self.folder / "ours").eval()
            self._near(self.of(read.base_model.model), self.trained, "PEFT's outputs with our file differ")

    def load(self) -> None:
        """Checks that a loaded adapter is bitwise equal, and that ejecting without merging restores the plain model."""
        model = self.fresh()
        cotolora.load_adapter(model, self.folder / "ours")
        if not same(self.of(model), self.trained):
            raise FindingError("outputs with a loaded adapter differ from those with the saved one")
        cotolora.eject(model, merge=False)
        if not same(self.of(model), self.plain):
            raise FindingError("outputs of an ejected model differ from the plain model's")
        if list(model.state_dict()) != self.keys:
            raise FindingError("the state dict keys of an ejected model differ from the plain model's")

    def from_peft(self) -> None:
        """Checks that we read PEFT's files."""
        if self.row["peft"] == "equal":
            model = self.fresh()
            cotolora.load_adapter(model, self.folder / "peft")
            self._near(self.of(model), self.peft_own, "our outputs with PEFT's file differ")

    def merge(self) -> None:
        """Checks that the merged model gives the same outputs, or that a warning named what differs."""
        before = len(self.told)
        cotolora.eject(self.model)
        if list(self.model.state_dict()) != self.keys:
            raise FindingError("the state dict keys of a merged model differ from the plain model's")
        error = distance(self.of(self.model), self.trained)
        if error > max(TOLERANCE, 10 * self.sensitivity()) and len(self.told) > before:
            self.notes.append(f"outputs differ after merging, as warned ({error:.1e} of the largest output)")
            return
        self._near(self.of(self.model), self.trained, "outputs differ after merging")


KINDS: dict[str, str] = {
    "had no gradient": "unreached",
    "stay frozen": "frozen share",
    "no forward has called": "merged uncalled",
    "leaves out modules that do not map in_features to out_features": "no linear map",
    "only one": "one group",
    "shared its weight": "was tied",
}


def _kind(line: str) -> str:
    return next((kind for words, kind in KINDS.items() if words in line), line[:80])


def tried(make: Callable[[], Subject], folder: Path) -> dict[str, Any]:
    """The row of the model that `make` returns."""
    try:
        subject = make()
    except Exception as error:
        why = str(error) if isinstance(error, NotBuiltError) else f"building it raises {reason(error)}"
        return {"outcome": NOT_BUILT, "stage": "build", "reason": why}
    return Trial(subject, folder).run()
