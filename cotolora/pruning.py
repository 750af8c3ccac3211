"""Prunes trained adapters, whole or entry by entry, and restores them.

Labels such as "middle" name the adapters that stay, as in the CoTo paper (Zhuang et al. 2025, arXiv:2506.05713).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn

from cotolora.checks import function, instance, integer, number, one_of, strings
from cotolora.groups import Unit, adapters, group_names, is_enabled, modules_of, unmerged_adapters
from cotolora.linear import CoToLoRALinear
from cotolora.matching import checked_names, matches, why_not_whole
from cotolora.reference import Gate
from cotolora.shapley import Shapley
from cotolora.wording import listed, shown

THIRDS = ("low", "middle", "high")
LABELS = ("every-other", *THIRDS)
SCOPES = ("global", "layer")
_MUST_KEEP = f"one of {LABELS}, names of adapters or a callable"

Keep = str | Iterable[str] | Callable[[str], object]


class Pruning(ABC):
    """A record of one pruning call, which can undo it; a context manager that undoes it on exit.

    Attributes:
        removed: number of removed entries of A and B by adapter name, in module order; counts entries that were zero.
    """

    def __init__(self, model: nn.Module, layers: dict[str, CoToLoRALinear], removed: dict[str, int]) -> None:
        self.removed = removed
        self._model, self._layers, self._undone = model, layers, False

    def undo(self) -> None:
        """Restores exactly what was removed, bit for bit. A second call does nothing.

        Nested calls are best undone in reverse order, as `with` does; any other order ends at the same model.

        Raises:
            RuntimeError: the adapters are not as this call left them: they were ejected, merged, cast, trained or
                loaded since. Nothing is restored then.
        """
        if self._undone:
            return
        present = {id(layer) for layer in adapters(self._model).values()}
        if gone := [name for name, layer in self._layers.items() if id(layer) not in present]:
            raise RuntimeError(f"undo needs the adapters that were pruned; the model no longer has {gone}")
        if merged := [name for name, layer in self._layers.items() if layer.merged]:
            raise RuntimeError(f"undo needs unmerged adapters (call their unmerge first); merged: {listed(merged)}")
        self._restore()
        self._undone = True

    @abstractmethod
    def _restore(self) -> None:
        """Restores the state before the call, or raises."""

    def __enter__(self) -> Pruning:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


class _SwitchedOff(Pruning):
    def __init__(self, model: nn.Module, layers: dict[str, CoToLoRALinear]) -> None:
        super().__init__(model, layers, {name: _size(layer) for name, layer in layers.items()})
        self._before: dict[str, Gate] = {name: layer.enabled for name, layer in layers.items()}
        for layer in layers.values():
            layer.enabled = False

    def _restore(self) -> None:
        for name, layer in self._layers.items():
            layer.enabled = self._before[name]


class _Zeroed(Pruning):
    def __init__(
        self, model: nn.Module, layers: dict[str, CoToLoRALinear], chosen: dict[str, tuple[Tensor, ...]]
    ) -> None:
        super().__init__(model, layers, {name: sum(int(mask.sum()) for mask in pair) for name, pair in chosen.items()})
        # keeps a mask of one byte per entry and the removed values, less than a copy up to a sparsity of 3/4.
        # Entries that are already zero are left out: an earlier call may have zeroed them and must restore them
        # itself, so that undoing in any order ends at the original model
        chosen = {
            name: tuple(mask & (p != 0) for p, mask in zip(_factors(layers[name]), pair, strict=True))
            for name, pair in chosen.items()
        }
        self._chosen = chosen
        self._before = {
            name: tuple(p.detach()[mask] for p, mask in zip(_factors(layers[name]), pair, strict=True))
            for name, pair in chosen.items()
        }
        with torch.no_grad():
            for name, pair in chosen.items():
                for parameter, mask in zip(_factors(layers[name]), pair, strict=True):
                    parameter.masked_fill_(mask, 0)

    @torch.no_grad()
    def _restore(self) -> None:
        places = [
            (name, *place)
            for name, layer in self._layers.items()
            for place in zip(_factors(layer), self._chosen[name], self._before[name], strict=True)
        ]
        for name, parameter, mask, values in places:
            if parameter.shape != mask.shape or parameter.dtype != values.dtype:
                raise RuntimeError(f"undo needs {name} in its dtype {values.dtype} and shape; they were changed since")
            if parameter[mask.to(parameter.device)].any():
                raise RuntimeError(f"undo needs {name} as pruning left it; it was trained or loaded since")
        for _, parameter, mask, values in places:
            parameter[mask.to(parameter.device)] = values.to(parameter.device)
        self._chosen, self._before = {}, {}


def prune(model: nn.Module, keep: Keep, *, unit: Unit = "layer") -> Pruning:
    r"""Disables all adapters (`enabled`) except those in `keep`; a disabled adapter runs no kernels and is not saved.

    Adapters that are already disabled stay so but count in the groups, so that a label always means the same layers.

    Args:
        model: a model with adapters.
        keep: the adapters that stay enabled.

            - "every-other": groups 0, 2, 4, …
            - "low", "middle", "high": the groups whose middle, ``(l + ½) / L`` for group l of L, lies in that
              third; if 3 does not divide L, low and high still have the same size: 4 groups are 1 + 2 + 1,
              5 are 2 + 1 + 2.
            - names of adapters, by the rules of `inject`: a list of whole names or dotted ends (``["q_proj"]``),
              or a string that is a regular expression for the whole name.
            - a callable from an adapter's name to whether it stays; `best` makes one from Shapley values.
        unit: the groups that the labels count: "layer", "module" or a callable, as in `CoTo`.

    Returns:
        a record of the disabled adapters, with `undo`.

    Raises:
        TypeError: `model` is not a module, or `keep` is none of these.
        ValueError: the model has no adapters or has merged ones, a name matches none, or no enabled adapter would stay.

    >>> from cotolora import inject
    >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    >>> layers = inject(model, rank=2)
    >>> with prune(model, keep="middle"):
    ...     [layer.enabled for layer in layers.values()]
    [False, True, True, False]
    """
    layers = unmerged_adapters(model)
    kept = _kept(list(layers), keep, group_names(layers, unit, modules_of(model)))
    if not any(is_enabled(layers[name]) for name in kept):
        off = f" ({len(kept)} that it keeps are already disabled)" if kept else ""
        raise ValueError(f"keep must leave an enabled adapter; {shown(keep)} leaves none of {len(layers)}{off}")
    # without those that are already disabled, so that undoing in any order ends at the original model
    going = {name: layer for name, layer in layers.items() if name not in kept and is_enabled(layer)}
    return _SwitchedOff(model, going)


def best(shapley: Shapley, count: int) -> Callable[[str], bool]:
    """A `keep` for `prune`: the adapters of the `count` groups with the highest Shapley values; earlier ones win ties.

    Raises:
        TypeError: `shapley` is not a Shapley.
        ValueError: `count` is not an integer from 1 to the number of groups.
    """
    n = len(instance("shapley", shapley, Shapley, "a Shapley, as shapley_values returns it").groups)
    count = integer("count", count, 1, n + 1, must=f"an integer from 1 to {n}, the number of groups")
    order = shapley.values.argsort(descending=True, stable=True)[:count].tolist()
    groups = list(shapley.groups.values())
    return frozenset(name for index in order for name in groups[index]).__contains__


def magnitude(model: nn.Module, sparsity: float, scope: str = "global") -> Pruning:
    """Zeroes the entries of A and B that are smallest in magnitude, exactly ``round(sparsity · n)`` of n.

    Entries that are already zero count among them. Ties are broken by module order, then A before B, then row by
    row. Disabled adapters are not changed and not counted. The entries are found by bisection over the bits of the
    magnitudes, one parameter at a time, so the temporary memory is proportional to the largest parameter; for `undo`,
    one byte per entry and the zeroed values are kept.

    The entries are zeroed once and do not stay zero under training: an optimizer changes them again (momentum does so
    even without a gradient), after which `undo` refuses to mix old values into new weights. Prune after training.

    Args:
        model: a model with adapters.
        sparsity: fraction of entries to zero, in [0, 1].
        scope: "global" ranks the magnitudes of all adapters together, "layer" those of each adapter by itself.

    Returns:
        a record of the zeroed entries, with `undo`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has no enabled adapters, has merged ones, or has ones whose A or B is sharded, on the meta
            device or contains NaN; an argument is out of its range.

    >>> from cotolora import inject
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> _ = inject(model, rank=2)  # B is zero in fresh adapters: 16 of 32 entries
    >>> magnitude(model, 0.5).removed
    {'0': 8, '1': 8}
    """
    sparsity = number("sparsity", sparsity, "a number in [0, 1]", lambda share: 0 <= share <= 1)
    one_of("scope", scope, SCOPES)
    layers = {name: layer for name, layer in unmerged_adapters(model).items() if is_enabled(layer)}
    if not layers:
        raise ValueError("model must have enabled adapters; all of them are disabled")
    for name, layer in layers.items():
        for parameter in _factors(layer):
            if parameter.is_meta or hasattr(parameter, "full_tensor"):
                raise ValueError(f"model must hold whole A and B; those of {name} are sharded or on the meta device")
            if parameter.isnan().any():
                raise ValueError(f"model must have no NaN in A or B; {name} has NaN")
    pools = [list(layers)] if scope == "global" else [[name] for name in layers]
    chosen: dict[str, tuple[Tensor, ...]] = {}
    for pool in pools:
        parameters = [parameter for name in pool for parameter in _factors(layers[name])]
        masks = _smallest(parameters, round(sparsity * sum(p.numel() for p in parameters)))
        chosen |= dict(zip(pool, zip(masks[::2], masks[1::2], strict=True), strict=True))
    return _Zeroed(model, layers, chosen)


def _factors(layer: CoToLoRALinear) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_a, layer.lora_b


def _smallest(parameters: list[nn.Parameter], count: int) -> list[Tensor]:
    """For each parameter, a mask of its entries that are among the `count` smallest in magnitude."""
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    border, ties = _border(parameters, count, dtype)
    masks = []
    for parameter in parameters:
        bits = _bits(parameter, dtype)
        mask, places = bits < border, (bits == border).flatten().nonzero().flatten()[:ties]
        mask.view(-1)[places] = True
        ties -= len(places)
        masks.append(mask)
    return masks


def _border(parameters: list[nn.Parameter], count: int, dtype: torch.dtype) -> tuple[int, int]:
    """The largest selected magnitude, as bits, and how many entries of exactly that magnitude are selected.

    All entries below it are selected.
    """
    low, below = 0, 0
    high = int(_bits(torch.tensor(torch.inf), dtype)) + 2  # above every count
    while high - low > 1 and below < count:
        middle = (low + high) // 2
        under = sum(int((_bits(p, dtype) < middle).sum()) for p in parameters)
        if under <= count:
            low, below = middle, under
        else:
            high = middle
    return low, count - below


def _bits(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The magnitudes as integers: the bits of non-negative floats sort as the floats do."""
    return values.detach().to(dtype).abs().contiguous().view(torch.int64 if dtype == torch.float64 else torch.int32)


def _size(layer: CoToLoRALinear) -> int:
    return layer.lora_a.numel() + layer.lora_b.numel()


def _kept(names: list[str], keep: Keep, named: Mapping[Hashable, list[str]]) -> set[str]:
    groups = list(named.values())
    if isinstance(keep, str) and keep in LABELS:
        if keep == "every-other":
            return {name for group in groups[::2] for name in group}
        # the third that holds (l + 1/2) / L, in integers: an odd number over an even one is never a border
        thirds = [3 * (2 * index + 1) // (2 * len(groups)) for index in range(len(groups))]
        return {
            name for group, third in zip(groups, thirds, strict=True) if third == THIRDS.index(keep) for name in group
        }
    if callable(keep):
        keeps = function("keep", keep, _MUST_KEEP)
        return {name for name in names if _as_bool(keeps(name))}
    if isinstance(keep, str):
        checked_names("keep", keep)
    # the adapters that each name, or the one expression, matches
    taken = {
        rule: {name for name in names if matches(name, keep if isinstance(keep, str) else [rule])}
        for rule in ([keep] if isinstance(keep, str) else _names_in(keep))
    }
    if missing := [rule for rule, found in taken.items() if not found]:
        ends = sorted({name.rpartition(".")[2] for name in names})
        part = why_not_whole("keep", keep, names) if isinstance(keep, str) else ""
        raise ValueError(
            f"keep {listed(missing)} matches no adapter; adapters end in {listed(ends)}, their groups are "
            f"{listed(map(str, named))}, labels are {LABELS}{part}"
        )
    return set().union(*taken.values())


def _as_bool(kept: object) -> bool:
    try:
        return bool(kept)
    except Exception:  # a value without a truth value, such as a tensor with several entries
        raise TypeError(f"keep must return True or False for a name; got {shown(kept)}") from None


def _names_in(keep: object) -> list[str]:
    names = strings("keep", keep, _MUST_KEEP)
    if not names:
        raise ValueError(f"keep must hold at least one name; got {shown(keep)}")
    return names
