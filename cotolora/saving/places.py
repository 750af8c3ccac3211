"""Where a model has the tensors that files speak of, by which names, and what PEFT would make a copy of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cotolora.groups import plain_name
from cotolora.linear import CoToLoRALinear
from cotolora.matching import with_parents

# what PEFT calls the module inside an adapter, and those inside of one that modules_to_save takes
_BASE, _WRAPPED = "base_layer", ("original_module", "modules_to_save")


def join_names(*names: str) -> str:
    """The names that are not empty, with dots between."""
    return ".".join(filter(None, names))


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of `module` itself."""
    kept = (item for item in module.named_buffers(recurse=False) if item[0] not in module._non_persistent_buffers_set)
    return dict([*module.named_parameters(recurse=False), *kept])


def inside_bases(model: nn.Module) -> set[nn.Module]:
    """The modules that adapters call as their base, with all that these hold."""
    bases = (module.base for module in model.modules() if isinstance(module, CoToLoRALinear))
    return {module for base in bases if base is not None for module in base.modules()}


def base_state(linear: nn.Module) -> dict[str, Tensor]:
    """The tensors of what an adapter is around, or would be, whether it is merged or not."""
    if isinstance(linear, CoToLoRALinear):
        if linear.base is None:
            bias = {} if linear.bias is None else {"bias": linear.bias}
            return {"weight": linear._base_weight(), **bias}
        linear = linear.base
    # not state_dict, whose hooks may gather or repack what they find
    return {
        join_names(name, key): tensor
        for name, module in linear.named_modules()
        for key, tensor in own_state(module).items()
    }


def base_tensors(linears: Mapping[str, nn.Module], keys: Iterable[str]) -> dict[str, Tensor]:
    """What `keys`, as PEFT writes them, mean of the bases of adapters: it saves those of embeddings and heads."""
    found = {}
    for key in keys:
        name, inside, attribute = key.rpartition(f".{_BASE}.")
        if inside and name in linears and (tensor := base_state(linears[name]).get(attribute)) is not None:
            found[key] = tensor
    return found


def superseded(keys: Iterable[str], saves: Callable[[str], bool]) -> set[str]:
    """Keys that PEFT writes beside a trained copy when it saves embeddings too: of what the copy has replaced."""
    keys, found = set(keys), set()
    for key in keys:
        for mark in _WRAPPED:
            name, inside, rest = key.partition(f".{mark}.")
            if inside and join_names(name, rest) in keys and saves(join_names(name, rest)):
                found.add(key)
    return found


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes; torch.equal knows no float8."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second.to(first.device))


class Copy(NamedTuple):
    """A tensor that PEFT would copy away from others that it is tied to.

    keys: of the file, that the copy is filled from.
    owners: what is to hold it: modules, and the names that it has there.
    tensor: what they hold now.
    others: names that it has elsewhere in the model.
    """

    keys: list[str]
    owners: list[tuple[nn.Module, str]]
    tensor: Tensor
    others: list[str]


class Places:
    """The modules and tensors of a model by all their names, of modules that lie in several places too.

    Attributes:
        modules: every module.
        state: the tensors outside of adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.state: dict[str, Tensor] = {}
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self._tied: dict[Hashable, list[str]] = {}
        inside = inside_bases(model)
        for raw_name, module in model.named_modules(remove_duplicate=False):
            if module not in inside:
                self._add(plain_name(raw_name), module)

    def _add(self, name: str, module: nn.Module) -> None:
        self.modules[name] = module
        adapted = isinstance(module, CoToLoRALinear)
        own = base_state(module) if adapted else own_state(module)
        for key, tensor in own.items():
            full = join_names(name, key)
            if full not in self._owners:
                self._tied.setdefault(memory(tensor), []).append(full)
            self._owners[full] = module, key
            if not adapted:
                self.state[full] = tensor

    def slot(self, name: str) -> Hashable:
        """The place of a module that has this name: the same under all names of the module around it."""
        parent, _, leaf = name.rpartition(".")
        return (id(self.modules[parent]), leaf) if name else None

    def copies(self, wraps: Callable[[str], bool], tensors: Mapping[str, Tensor]) -> tuple[list[Copy], list[str]]:
        """What PEFT would copy away from what it is tied to, and what of the modules that it copies is not in the file.

        Where the file gives one value to all that are tied, they may as well stay so.

        Args:
            wraps: whether modules_to_save takes a module of such a name.
            tensors: of the file.

        Raises:
            ValueError: a module to copy lies in other places of the model too.
        """
        found: list[Copy] = []
        missing: list[str] = []
        copied = {self.slot(name) for name in self.modules if wraps(name)}
        for names in self._tied.values() if copied else ():
            by_copy: dict[Hashable, list[str]] = {}
            for name in names:
                slots = (self.slot(parent) for parent in with_parents(name)[:-1])
                by_copy.setdefault(next((slot for slot in slots if slot in copied), None), []).append(name)
            given = {copy: [name for name in same if name in tensors] for copy, same in by_copy.items()}
            missing += [same[0] for copy, same in by_copy.items() if copy and not given[copy] and same[0] in self.state]
            if len(by_copy) == 1 or (all(given.values()) and _agree([tensors[k] for ks in given.values() for k in ks])):
                continue
            for copy, keys in given.items():
                if copy is not None and keys:
                    found.append(self._copy(keys, by_copy[copy], [name for name in names if name not in by_copy[copy]]))
        return found, missing

    def _copy(self, keys: list[str], names: list[str], others: list[str]) -> Copy:
        owners = [self._owners[name] for name in names]
        modules = {module for module, _ in owners}
        if shared := [name for name in others if self._owners[name][0] in modules]:
            raise ValueError(
                f"modules_to_save takes the module of {keys[0]}, which the model has as that of {shared[0]} too: a "
                "trained copy, as PEFT makes one, would leave that as it was (give the model a module for each)"
            )
        return Copy(keys, owners, self.state[names[0]], others)


def _agree(tensors: list[Tensor]) -> bool:
    return all(is_same(tensors[0], tensor) for tensor in tensors[1:])


def memory(tensor: Tensor) -> Hashable:
    """The same of tensors that one write changes, as far as that can be seen."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (tensor.device, tensor.data_ptr()) if plain and tensor.numel() and not tensor.is_meta else id(tensor)
