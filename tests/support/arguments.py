"""A pool of argument values, predicates for valid ones, and checks that a refused call changed nothing."""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cotolora import CoTo, Schedule, inject, save_adapter
from cotolora.backends import choice
from cotolora.merging import AdapterState, Factors
from cotolora.pruning import Pruning, magnitude
from cotolora.shapley import Shapley, shapley_values

# values by their source text; created again for each call
POOL: dict[str, Callable[[], Any]] = {
    text: (lambda text=text: eval(text))
    for text in (
        "None", "True", "False", "0", "1", "2", "-1", "3", "10**15", "2**70", "10**400", "0.5", "1.5", "-0.5", "0.0",
        "math.nan", "math.inf", "-math.inf", "1j", "'x'", "''", "'0.5'", "'\\0'", "b'x'", "b''",
        "[]", "()", "{}", "set()", "[None]", "[1.5, 'x']", "['x']", "{'x': 'x'}", "{0: None}", "range(2)", "object()",
        "len", "int", "lambda *_: 1.0", "lambda *_: []", "Path('x')", "np.True_", "np.int64(-1)", "np.float64('nan')",
        "np.int64(2)", "np.float32(0.5)", "np.array(None)", "np.zeros(2)", "np.zeros((2, 2, 2), dtype=np.int64)",
        "np.array(['x'])", "np.dtype('float32')", "torch.float32", "torch.int64", "torch.float8_e4m3fn",
        "torch.device('meta')", "torch.tensor(1.5)", "torch.tensor(True)", "torch.tensor(2)", "torch.zeros(0)",
        "torch.zeros(2, 2, 2)", "torch.zeros(7, 5)", "torch.zeros(2, 4, dtype=torch.int64)", "torch.zeros(2, 4) * 1j",
        "torch.zeros(2, 4, device='meta')", "torch.zeros(2, 4).to(torch.float8_e4m3fn)", "nn.LayerNorm(2)",
        "torch.ones((), dtype=torch.bool).to_sparse()",
        "nn.Parameter(torch.zeros(3))", "nn.Linear", "nn.Sequential()", "np.complex64(1)", "'\\ud800'", "Unprintable()",
    )
}  # fmt: skip


class Unprintable:
    """An object that an error message cannot show: its repr and its truth value raise."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")


# predicates: True for a value that must be accepted, False for one that must be refused, None if either is fine

Kind = Callable[[Any], bool | None]


def whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def real(value: Any) -> bool:
    """Whether the value is a number that a float can represent."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and abs(value if isinstance(value, int) else float(value)) <= sys.float_info.max


def integers(least: int, below: float = math.inf, tried: float = math.inf) -> Kind:
    """Integers in [least, below); those from `tried` on are not tested, as they take too long or too much memory."""

    def fits(value: Any) -> bool | None:
        right = whole(value) and least <= value < below
        return None if right and value >= tried else right

    return fits


def numbers(fits: Callable[[float], bool] = math.isfinite) -> Kind:
    return lambda value: real(value) and bool(fits(float(value)))


def maybe(kind: Kind) -> Kind:
    return lambda value: value is None or kind(value)


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def nothing(value: Any) -> bool:
    """For an argument for which the pool has no valid value."""
    return False


def module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def other_module(value: Any) -> bool | None:
    """A module; it may still be refused for what it contains."""
    return None if module(value) else False


def path(value: Any) -> bool | None:
    """A path; it may still be refused if there is nothing to read."""
    return None if isinstance(value, Path) or (isinstance(value, str) and value and value.isprintable()) else False


def function(value: Any) -> bool | None:
    """A callable; classes and builtins may raise errors of their own."""
    if not callable(value) or module(value):
        return False
    return None if not hasattr(value, "__code__") or value() == [] else True


def output_function(value: Any) -> bool | None:
    """A callable, or a module that is applied to the output of another."""
    return module(value) or callable(value)


def hashing(value: Any) -> bool | None:
    """A function that returns keys of a dict."""
    return False if hasattr(value, "__code__") and value() == [] else function(value)


def names(value: Any) -> bool | None:
    """An iterable of strings, which must also be names in the model."""
    listed = (
        hasattr(value, "__iter__") and not isinstance(value, (bytes, Tensor, type, nn.Module)) and np.shape(value) != ()
    )
    listed = listed or isinstance(value, (str, dict, set))
    return None if listed and all(isinstance(name, str) for name in value) else False


def states(value: Any) -> bool | None:
    """A list of paths; it may still be refused if there is nothing to read."""
    listed = isinstance(value, (list, np.ndarray)) and names(value) is None and len(value)
    return None if listed else False


def empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def empty_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not value


def float8(value: Any) -> bool | None:
    """A tensor of any floating dtype, for arguments that are cast."""
    return None if isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn else False


def python(kind: Kind) -> Kind:
    """As `kind`, except that numpy's numbers are not tested."""
    return lambda value: None if isinstance(value, np.generic) and kind(value) else kind(value)


def float32(value: Any) -> bool:
    return value is torch.float32


def fields(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def gate(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.layout == torch.strided and value.dtype in (torch.bool, torch.int64)
    return flag(value)


def mask(value: Any) -> bool:
    """A mask for three adapters: one entry or three, each zero or one."""
    try:
        found = np.asarray(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return found.dtype.kind in "biuf" and found.shape in ((), (3,)) and bool(np.isin(found, (0, 1)).all())


def device(value: Any) -> bool | None:
    """A device; an integer is a device index, which may not exist."""
    return True if isinstance(value, torch.device) else None if type(value) is int and 0 <= value < 128 else False


def inputs(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) > 0


def weights(value: Any) -> bool:
    """Weights of two states."""
    return value is None or (isinstance(value, (range, np.ndarray)) and np.shape(value) == (2,))


def peft_name(value: Any) -> bool | None:
    """A valid name of a torch module."""
    return isinstance(value, str) and value != "" and "." not in value


# models and other objects for the calls


class World:
    """Models and related objects, created on first access."""

    @cached_property
    def plain(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    @cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(2)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        for layer in inject(model, rank=2).values():
            nn.init.normal_(layer.lora_b)
        return model

    @cached_property
    def layer(self) -> nn.Module:
        return self.model[1]

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)

    @cached_property
    def coto(self) -> CoTo:
        return CoTo(self.model, 10)

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule()

    @cached_property
    def state(self) -> AdapterState:
        return AdapterState.from_model(self.model)

    @cached_property
    def factors(self) -> Factors:
        return self.state.factors["0"]

    @cached_property
    def shapley(self) -> Shapley:
        return shapley_values(self.model, lambda model: 1.0, method="exact")

    @cached_property
    def pruning(self) -> Pruning:
        return magnitude(self.model, 0.5)

    @cached_property
    def saved(self) -> Path:
        save_adapter(self.model, Path("saved"))
        return Path("saved")

    @cached_property
    def peft(self) -> nn.Module:
        import peft

        return peft.get_peft_model(self.plain, peft.LoraConfig(target_modules=["0", "2"], r=2))

    def states(self) -> Iterator[tuple[str, Any]]:
        """All state that a refused call must not change."""
        for which in ("plain", "model", "peft"):
            if which in vars(self):
                for name, one in vars(self)[which].named_modules():
                    yield f"{which}.{name}", (id(one), type(one), one.training, list(one._modules))
                    yield f"hooks of {which}.{name}", (len(one._forward_hooks), len(one._forward_pre_hooks))
                    yield from ((f"{which}.{name}.{key}", at(p)) for key, p in one._parameters.items())
                    yield from ((f"{which}.{name}.{key}", at(b)) for key, b in one._buffers.items())
        if "model" in vars(self):
            for name, layer in self.model.named_children():
                yield f"switches of {name}", (str(layer.gate), str(layer.enabled), layer.merged, layer.spec)
        if "coto" in vars(self):
            yield "coto", (self.coto.state_dict(), self.coto.mask.tolist(), self.coto.p)
        if "optimizer" in vars(self):
            yield "optimizer", len(self.optimizer._optimizer_step_pre_hooks)
        yield "random numbers", torch.get_rng_state().numpy().tobytes()
        yield "numpy's random numbers", np.random.get_state()[2]
        yield "backend", choice._set_here()
        yield "files", list(os.walk("."))


def at(tensor: Tensor | None) -> Any:
    return tensor if tensor is None else (id(tensor), tensor.requires_grad, tensor.detach().numpy().tobytes())


# checks of a call's error

CUT = 18  # characters of a long value that an error must show


def outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> Exception | None:
    """The error that a call raises, or that a context manager raises on entering."""
    try:
        result = call(**arguments)
        if isinstance(result, AbstractContextManager):
            with result:
                pass
    except Exception as error:
        return error
    return None


def faults(error: Exception, argument: str, value: Any) -> list[str]:
    """The defects of an error about an argument: its class, a missing name, a missing value."""
    found = []
    if not isinstance(error, (TypeError, ValueError, RuntimeError, OSError)):
        found.append("is of another kind")
    if not occurs(argument, text := str(error)) and not isinstance(error, OSError):
        found.append("does not name the argument")
    if not any(occurs(look, text) for look in looks(value)):
        found.append("does not show the value")
    if len(text) > 1500:
        found.append(f"takes {len(text)} characters")
    return found


def occurs(word: str, text: str) -> bool:
    before = r"(?<!\w)" if word[:1].isalnum() else ""
    after = r"(?!\w)" if word[-1:].isalnum() and len(word) != CUT else ""
    return re.search(before + re.escape(word) + after, text) is not None


def looks(value: Any) -> Iterator[str]:
    """Texts by which a reader recognises the value."""
    yield type(value).__name__
    if isinstance(value, Tensor):
        yield from (str(value.dtype), str(tuple(value.shape)), str(list(value.shape)), str(value.device))
        value = [] if value.is_meta else value.tolist()
    if isinstance(value, np.ndarray):
        yield str(value.shape)
        value = value.tolist()
    if isinstance(value, (list, tuple, range)):
        yield f"({len(value)},)"
        yield from (look for item in value for look in looks(item))
    if isinstance(value, dict):
        yield from (look for item in (*value, *value.values()) for look in looks(item))
    if not isinstance(value, Unprintable):
        text = repr(value)
        yield text if len(text) < 100 else text[:CUT]
