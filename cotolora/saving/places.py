"""Finds the tensors of a model by the names that files use, and those that PEFT would copy."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cotolora.groups import plain_name
from cotolora.linear import CoToLoRALinear
from cotolora.matching import with_parents

# PEFT's names for the module inside an adapter, and for the two inside a module of modules_to_save
_BASE, _WRAPPED = "base_layer", ("original_module", "modules_to_save")


def join_names(*names: str) -> str:
    """The non-empty names, joined by dots."""
    return ".".join(filter(None, names))


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of `module`, without those of its children."""
    kept = (item for item in module.named_buffers(recurse=False) if item[0] not in module._non_persistent_buffers_set)
    return dict([*module.named_parameters(recurse=False), *kept])


def inside_bases(model: nn.Module) -> set[nn.Module]:
    """The modules that adapters call as their base, and all modules inside these."""
    bases = (module.base for module in model.modules() if isinstance(module, CoToLoRALinear))
    return {module for base in bases if base is not None for module in base.modules()}


def base_state(linear: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base of an adapter, or of a plain module; unmerged ones even if the adapter is merged."""
    if isinstance(linear, CoToLoRALinear):
        if linear.base is None:
            bias = {} if linear.bias is None else {"bias": linear.bias}
            return {"weight": linear._base_weight(), **bias}
        linear = linear.base
    # not state_dict, whose hooks may gather or repack tensors
    return {
        join_names(name, key): tensor
        for name, module in linear.named_modules()
        for key, tensor in own_state(module).items()
    }


def base_tensors(linears: Mapping[str, nn.Module], keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of adapter bases that `keys` refer to, as PEFT writes them when it saves embeddings and heads."""
    found = {}
    for key in keys:
        name, inside, attribute = key.rpartition(f".{_BASE}.")
        if inside and name in linears and (tensor := base_state(linears[name]).get(attribute)) is not None:
            found[key] = tensor
    return found


def superseded(keys: Iterable[str], saves: Callable[[str], bool]) -> set[str]:
    """Keys of the tensors that a trained copy has replaced; PEFT writes them as well when it saves embeddings."""
    keys, found = set(keys), set()
    for key in keys:
        for mark in _WRAPPED:
            name, inside, rest = key.partition(f".{mark}.")
            if inside and join_names(name, rest) in keys and saves(join_names(name, rest)):
                found.add(key)
    return found


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes; torch.equal does not support float8."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second.to(first.device))


class Copy(NamedTuple):
    """A tensor that PEFT would copy, so that it is no longer tied to others.

    keys: the keys of the file that the copy is filled from.
    owners: the modules that get the copy, and its name in each.
    tensor: the tensor that they have now.
    others: the names of that tensor elsewhere in the model.
    """

    keys: list[str]
    owners: list[tuple[nn.Module, str]]
    tensor: Tensor
    others: list[str]


class Places:
    """The modules and tensors of a model by all their names, including those of modules in several places.

    Attributes:
        modules: every module.
        state: the tensors outside adapters.
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
        """The place of the module `name`: its parent module and its name there, so independent of the parent's name."""
        parent, _, leaf = name.rpartition(".")
        return (id(self.modules[parent]), leaf) if name else None

    def copies(self, wraps: Callable[[str], bool], tensors: Mapping[str, Tensor]) -> tuple[list[Copy], list[str]]:
        """The tied tensors that PEFT would copy, and tensors of the copied modules that are not in the file.

        If the file has the same value for all tied names, they stay tied.

        Args:
            wraps: says whether modules_to_save matches a module name.
            tensors: the tensors of the file.

        Raises:
            ValueError: a module to copy is in other places of the model as well.
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
                f"modules_to_save must match a module that is in one place of the model; the module of {keys[0]} is "
                f"that of {shared[0]} too, which PEFT's trained copy would not change (use a separate module for each)"
            )
        return Copy(keys, owners, self.state[names[0]], others)


def _agree(tensors: list[Tensor]) -> bool:
    return all(is_same(tensors[0], tensor) for tensor in tensors[1:])


def memory(tensor: Tensor) -> Hashable:
    """A key that is equal for tensors that share memory, as far as that can be determined."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (tensor.device, tensor.data_ptr()) if plain and tensor.numel() and not tensor.is_meta else id(tensor)
