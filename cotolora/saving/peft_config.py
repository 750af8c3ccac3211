"""PEFT's ``adapter_config.json``: what it says of an adapter, and how ours is written."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from cotolora.groups import plain_name
from cotolora.linear import CoToLoRALinear
from cotolora.matching import Patterns, compile_patterns, compiled, first_match, matches
from cotolora.saving.layers import settings

# PEFT fields that do not change what the adapter computes once its weights are loaded
_HARMLESS = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
))  # fmt: skip
# names that PEFT puts into a model, where it looks for modules_to_save afterwards
_INSIDE = (
    "base_layer",
    "lora_A.default",
    "lora_A",
    "lora_B.default",
    "lora_B",
    "lora_dropout",
    "lora_magnitude_vector",
    "hira_A",
    "hira_B",
    "hira_dropout.default",
    "hira_dropout",
)
# initialisations that leave the base weights alone; the others train on a residual base
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class PeftConfig:
    """What of a PEFT config bears on loading."""

    rank: int
    lora_alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    use_rslora: bool
    dropout: float
    targets: str | list[str]
    exclude: str | list[str] | None
    layers_to_transform: list[int]
    layers_pattern: list[str]
    modules_to_save: list[str]
    variant: str

    def alpha_of(self, name: str) -> float:
        """Alpha of the module `name`."""
        return first_match(self.alpha_pattern, name, self.lora_alpha)

    def rank_of(self, name: str) -> int:
        """Rank of the module `name`."""
        return first_match(self.rank_pattern, name, self.rank)

    def takes(self, name: str) -> bool:
        """PEFT's rule for target_modules, exclude_modules, modules_to_save and layers_to_transform."""
        if (self.exclude and matches(name, self.exclude)) or not matches(name, self.targets):
            return False
        if any(re.match(rf"(^|.*\.){re.escape(module)}($|\..*)", name) for module in self.modules_to_save):
            return False
        if not self.layers_to_transform or isinstance(self.targets, str) or name in self.targets:
            return True
        rules = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in self.layers_pattern]
        rules = rules or [r".*?\.[^.]*\.(?P<index>\d+)\."]
        found = next((match for rule in rules if (match := re.match(rule, name))), None)
        return found is not None and int(found["index"]) in self.layers_to_transform


def parse(fields: dict[str, Any]) -> PeftConfig:
    """Checks the fields of a config. One that is unknown and set is refused, since it may change the result.

    Raises:
        ValueError: names the field, what it must be and what it was.
    """
    rest = dict(fields)

    def take(name: str, must: str, test: Callable[[Any], bool], default: Any = None) -> Any:
        value = rest.pop(name, default)
        if not test(value):
            raise ValueError(f"{name} must be {must}; got {value!r}")
        return value

    method = take("peft_type", "'LORA' or 'HIRA', the methods supported", lambda value: value in ("LORA", "HIRA"))
    hira = method == "HIRA"
    init, dropout = ("init_weights", "hira_dropout") if hira else ("init_lora_weights", "lora_dropout")
    take("bias", "'none': trained biases are not supported", lambda value: value == "none", "none")
    take(init, f"one of {_INITS}: others change the base weights", lambda value: value in _INITS)

    def of_lora(name: str, must: str, test: Callable[[Any], bool], default: Any = None) -> Any:
        # left in `rest` with HiRA, which does not know it
        return default if hira else take(name, must, test, default)

    use_dora = of_lora("use_dora", "a bool", lambda value: isinstance(value, bool), False)
    rank = take("r", "a positive integer", _is_size, 32 if hira else 8)
    config = PeftConfig(
        rank=rank,
        lora_alpha=of_lora("lora_alpha", "a finite number", _is_number, rank if hira else 8),
        rank_pattern=compile_patterns(
            "rank_pattern", take("rank_pattern", "a map to positive integers", _optional(_map_of(_is_size)))
        ),
        alpha_pattern=compile_patterns(
            "alpha_pattern", of_lora("alpha_pattern", "a map to finite numbers", _optional(_map_of(_is_number)))
        ),
        use_rslora=of_lora("use_rslora", "a bool", lambda value: isinstance(value, bool), False),
        dropout=take(dropout, "a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1, 0.0),
        targets=take("target_modules", "a regular expression or a list of names", _optional(_are_names)) or [],
        exclude=take("exclude_modules", "a regular expression or a list of names", _optional(_are_names)),
        layers_to_transform=_as_list(
            take("layers_to_transform", "an integer or a list of them", _optional(_one_or_many(_is_index)))
        ),
        layers_pattern=_as_list(take("layers_pattern", "names", _optional(_are_names))),
        modules_to_save=_as_list(take("modules_to_save", "names", _optional(_are_names))),
        variant="hira" if hira else "dora" if use_dora else "lora",
    )
    if unsupported := {name: value for name, value in rest.items() if value and name not in _HARMLESS}:
        raise ValueError(f"these settings are not supported and would change the result: {unsupported}")
    if not config.targets:
        raise ValueError(f"target_modules must be a regular expression or a list of names; got {config.targets!r}")
    for name, value in (("target_modules", config.targets), ("exclude_modules", config.exclude)):
        if isinstance(value, str):
            compiled(name, value)
    for value in config.layers_pattern:
        compiled("layers_pattern", value)
    return config


def _is_size(value: Any) -> bool:
    return _is_index(value) and value > 0


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    largest = sys.float_info.max  # comparing takes integers that no float can hold, which math.isfinite does not
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _optional(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _map_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(test(item) for item in value.values())


def _one_or_many(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(test(item) for item in value) if isinstance(value, list) else test(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def describe(model: nn.Module, layers: dict[str, CoToLoRALinear], modules: list[str]) -> dict[str, Any]:
    """The config of `layers`; `modules` are the names for modules_to_save.

    Raises:
        ValueError: the layers are of more than one variant.
    """
    variants = {layer.variant: name for name, layer in layers.items()}
    if len(variants) > 1:
        raise ValueError(
            "model must hold adapters of one variant, as PEFT's config states one for all; it holds "
            + " and ".join(f"{variant!r} ({name})" for variant, name in variants.items())
        )
    (variant,) = variants
    others = [plain_name(name) for name, _ in model.named_modules() if plain_name(name) not in layers]
    ambiguous = any(other.endswith("." + name) for other in others for name in layers)
    path = getattr(model, "name_or_path", None)
    kept = {
        "base_model_name_or_path": path if isinstance(path, str) and path else None,
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "modules_to_save": modules or None,
    }
    scalings = {name: Scaling(*settings(layer), layer.use_rslora) for name, layer in layers.items()}
    dropout = max(layer.dropout for layer in layers.values())
    if variant == "hira":
        own = {"peft_type": "HIRA", "hira_dropout": dropout, "init_weights": True, **_ranks(scalings)}
    else:
        own = {**lora_fields(scalings), "lora_dropout": dropout, "use_dora": variant == "dora"}
    # a list takes dotted ends too; where that would take more than the adapters, an exact expression
    return {**kept, "target_modules": just(layers) if ambiguous else list(layers), **own}


class Scaling(NamedTuple):
    """What a config says of one adapter."""

    rank: int
    alpha: float
    use_rslora: bool


def lora_fields(adapters: Mapping[str, Scaling]) -> dict[str, Any]:
    """The fields of a config that are about these adapters of plain LoRA, but for the names of their modules."""
    use_rslora = all(adapter.use_rslora for adapter in adapters.values())
    # where only some layers are rsLoRA, every layer states its scale as alpha / rank
    alphas = {
        name: _plain_number(alpha * (math.sqrt(rank) if rslora and not use_rslora else 1))
        for name, (rank, alpha, rslora) in adapters.items()
    }
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
        "alpha_pattern": {exactly(name): value for name, value in alphas.items() if value != alpha},
        **_ranks(adapters),
    }


def _ranks(adapters: Mapping[str, Scaling]) -> dict[str, Any]:
    rank = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0][0]
    pattern = {exactly(name): adapter.rank for name, adapter in adapters.items() if adapter.rank != rank}
    return {"task_type": None, "inference_mode": True, "r": rank, "rank_pattern": pattern}


def just(names: Iterable[str]) -> str:
    """A regular expression that takes just these names."""
    return "|".join(re.escape(name) for name in names)


def is_alone(name: str, others: Iterable[str]) -> bool:
    """Whether PEFT, finding `name` in modules_to_save, takes no other module and keeps adapters out of no other.

    It takes every module whose name ends so, inside a component too, and reads `name` as a regular expression.
    """
    if set(name) & set(r"^$*+?{}[]\|()"):
        return False
    inside = re.compile(rf"(^|.*\.){name}($|\..*)")
    return not any(other != name and (other.endswith(name) or inside.match(other)) for other in (*others, *_INSIDE))


def exactly(name: str) -> str:
    """A key of rank_pattern or alpha_pattern that takes this one name and no longer one."""
    return "^" + re.escape(name)


def _plain_number(value: float) -> int | float:
    return int(value) if value == int(value) else value
