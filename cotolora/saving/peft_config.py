"""Reads and writes PEFT's ``adapter_config.json``."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from cotolora.checks import LARGEST
from cotolora.groups import plain_name
from cotolora.linear import CoToLoRALinear
from cotolora.matching import (
    Patterns,
    compile_patterns,
    compiled_all,
    dotted_ends,
    first_match,
    taking,
    with_parents,
)
from cotolora.saving.experts import mistaken, weight_of
from cotolora.spec import AdapterSpec
from cotolora.variants import VARIANTS
from cotolora.variants.base import Variant
from cotolora.wording import shown

# PEFT fields that do not change what the adapter computes once its weights are loaded
_HARMLESS = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
))  # fmt: skip


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a PEFT config that matter for loading; `fields` holds those specific to the variant."""

    variant: str
    rank: int
    alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    use_rslora: bool
    dropout: float
    targets: str | list[str]
    exclude: str | list[str] | None
    layers_to_transform: list[int]
    layers_pattern: list[str]
    modules_to_save: list[str]
    parameters: list[str]
    fields: dict[str, Any]

    def spec_of(self, name: str, stored_rank: int | None = None) -> AdapterSpec:
        """The settings of the adapter of the module `name`, whose stored tensors have rank `stored_rank`."""
        method, name = VARIANTS[self.variant].peft, self.pattern_name(name)
        rank = first_match(self.rank_pattern, name, self.rank)
        if not method.patterned and stored_rank == self.rank:
            rank = self.rank  # PEFT wrote a rank_pattern but did not apply it
        alpha = first_match(self.alpha_pattern, name, self.alpha) if method.scaled else rank
        return AdapterSpec(rank, alpha, self.dropout, self.use_rslora, self.variant)

    def pattern_name(self, name: str) -> str:
        """The name that rank_pattern and alpha_pattern are matched with for the module `name`."""
        return weight_of(name) if self.takes_parameter(weight_of(name)) else name

    def takes_parameter(self, key: str) -> bool:
        """PEFT's rule for target_parameters, which matches dotted ends of names."""
        return bool(self.parameters) and not self._parameters.isdisjoint(dotted_ends(key))

    def takes(self, name: str) -> bool:
        """Whether PEFT targets the module `name`.

        By target_modules, exclude_modules, modules_to_save and layers_to_transform; or by target_parameters alone,
        which the others do not restrict.
        """
        if self.takes_parameter(weight_of(name)):
            return True
        if (self.exclude and self._excludes(name)) or not self._targets(name):
            return False
        # modules_to_save and modules inside these are not targets
        parts = [end for whole in with_parents(name) for end in dotted_ends(whole)]
        if not self._saved.isdisjoint(parts):
            return False
        if not self.layers_to_transform or isinstance(self.targets, str) or name in self._exact:
            return True
        found = next((match for rule in self._layers if (match := rule.match(name))), None)
        return found is not None and int(found["index"]) in self.layers_to_transform

    def wraps(self, name: str) -> bool:
        """PEFT's rule for modules_to_save, which matches ends of names, not only dotted ones."""
        return bool(self._saved) and any(name[place:] in self._saved for place in range(len(name)))

    def saves(self, key: str) -> bool:
        """Whether modules_to_save matches a module around the tensor `key`."""
        return any(self.wraps(name) for name in with_parents(key)[:-1])

    def check_patterns(self) -> None:
        """Raises ValueError if a pattern is not a regular expression, or could take very long to match."""
        _ = self._targets, self._excludes, self._layers

    @cached_property
    def _targets(self) -> Callable[[str], bool]:
        return taking("target_modules", self.targets)

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(self.parameters)

    @cached_property
    def _exact(self) -> frozenset[str]:
        return frozenset(self.targets)

    @cached_property
    def _excludes(self) -> Callable[[str], bool]:
        return taking("exclude_modules", self.exclude or [])

    @cached_property
    def _saved(self) -> frozenset[str]:
        return frozenset(self.modules_to_save)

    @cached_property
    def _layers(self) -> list[re.Pattern[str]]:
        rules = compiled_all("layers_pattern", self.layers_pattern, r"(?:^|.*?\.)", r"\.(?P<index>\d+)\.")
        return rules or [re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")]


def parse_config(fields: dict[str, Any]) -> PeftConfig:
    """Checks the fields of a config. An unknown field that is set is refused, since it may change the result.

    Raises:
        ValueError: a field is not supported; the message has the field, what it must be and what it was.
    """
    rest = dict(fields)

    def take(name: str, must: str, test: Callable[[Any], bool], default: Any = None) -> Any:
        value = rest.pop(name, default)
        if not test(value):
            raise ValueError(f"{name} must be {must}; got {shown(value)}")
        return value

    types = list(dict.fromkeys(variant.peft.peft_type for variant in VARIANTS.values()))
    must = " or ".join(map(repr, types)) + ", the methods supported"
    peft_type = take("peft_type", must, lambda value: value in types)
    variants = [variant for variant in VARIANTS.values() if variant.peft.peft_type == peft_type]
    names = {flag for variant in variants for flag in variant.peft.flags}
    flags = {name: take(name, "a bool", lambda value: isinstance(value, bool), False) for name in names}
    found = [variant for variant in variants if flags == dict.fromkeys(names, False) | dict(variant.peft.flags)]
    if not found:
        raise ValueError(f"{', '.join(names)} must be as in one of {[v.name for v in variants]}; got {flags}")
    method = found[0].peft

    take("bias", "'none': trained biases are not supported", lambda value: value == "none", "none")
    inits = tuple(method.inits)
    take(
        method.init,
        f"one of {inits}: others change the base weights (save such an adapter with PEFT's "
        "path_initial_model_for_weight_conversion, which converts it to plain LoRA)",
        lambda value: (value.lower() if isinstance(value, str) else value) in inits,
    )
    take(
        "ensure_weight_tying",
        "False: this library does not tie trained copies of tied weights (if the adapter trains neither embedding nor "
        "head, the field has no effect and may be set to false)",
        lambda value: not value,
    )

    def of_scaled(name: str, must: str, test: Callable[[Any], bool], default: Any = None) -> Any:
        # a method without scale leaves the field in `rest`, where it is refused
        return take(name, must, test, default) if method.scaled else default

    def take_names(name: str) -> Any:
        value = take(name, "a regular expression or a list of names", _optional(_are_names))
        return sorted(set(value)) if isinstance(value, list) else value  # the order does not matter

    config = PeftConfig(
        variant=found[0].name,
        rank=take("r", "a positive integer", _is_size, method.default_rank),
        alpha=of_scaled("lora_alpha", "a finite number of float32", _is_number, method.default_alpha),
        rank_pattern=compile_patterns(
            "rank_pattern", take("rank_pattern", "a map to positive integers", _optional(_map_of(_is_size)))
        ),
        alpha_pattern=compile_patterns(
            "alpha_pattern",
            of_scaled("alpha_pattern", "a map to finite numbers of float32", _optional(_map_of(_is_number))),
        ),
        use_rslora=of_scaled("use_rslora", "a bool", lambda value: isinstance(value, bool), False),
        dropout=take(method.dropout, "a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1, 0.0),
        targets=take_names("target_modules") or [],
        exclude=take_names("exclude_modules"),
        layers_to_transform=_as_list(
            take("layers_to_transform", "an integer or a list of them", _optional(_one_or_many(_is_index)))
        ),
        # keeps the order: the first pattern that matches determines the layer index
        layers_pattern=_as_list(
            take("layers_pattern", "a regular expression or a list of them", _optional(_are_names))
        ),
        modules_to_save=_as_list(take_names("modules_to_save")),
        parameters=sorted(
            set(
                (take("target_parameters", "a list of names", _optional(_is_list_of_names)) or [])
                if peft_type == "LORA"
                else []
            )
        ),
        fields={name: take(name, f"like {value!r}", _is_like(value), value) for name, value in method.fields.items()},
    )
    # an empty dict enables a method with its defaults
    given = {name: value for name, value in rest.items() if value or isinstance(value, dict)}
    if unsupported := {name: value for name, value in given.items() if name not in _HARMLESS}:
        raise ValueError(
            f"these settings are not supported and would change the result: {shown(unsupported)}; load "
            "such an adapter with PEFT, or merge it into the base with PEFT's merge_and_unload()"
        )
    if not config.targets and not config.parameters:
        raise ValueError(f"target_modules must be a regular expression or a list of names; got {shown(config.targets)}")
    config.check_patterns()
    return config


def is_same_config(one: dict[str, Any], other: Any) -> bool:
    """Whether the fields of two configs describe the same adapter; ignores fields without effect."""
    try:
        return isinstance(other, dict) and parse_config(one) == parse_config(other)
    except ValueError:
        return False


def _is_size(value: Any) -> bool:
    return _is_index(value) and value > 0


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    # a comparison accepts integers too large for a float; math.isfinite raises on them
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and _are_names(value)


def _is_like(default: Any) -> Callable[[Any], bool]:
    if isinstance(default, float):
        return _is_number
    return lambda value: type(value) is type(default)


def _optional(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _map_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(test(item) for item in value.values())


def _one_or_many(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(test(item) for item in value) if isinstance(value, list) else test(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def make_config(model: nn.Module, layers: dict[str, CoToLoRALinear], modules_to_save: list[str]) -> dict[str, Any]:
    """The config of `layers`.

    Raises:
        ValueError: the layers have more than one variant.
    """
    variants = {layer.variant: name for name, layer in layers.items()}
    if len(variants) > 1:
        raise ValueError(
            "model must hold adapters of one variant, because a PEFT config has one for all; it holds "
            + " and ".join(f"{variant!r} ({name})" for variant, name in variants.items())
        )
    others = [plain_name(name) for name, _ in model.named_modules() if plain_name(name) not in layers]
    # PEFT finds these only by their weights
    by_weight = mistaken(model, layers) if VARIANTS[next(iter(variants))].peft.peft_type == "LORA" else []
    modules = [name for name in layers if name not in set(by_weight)]
    ambiguous = any(other.endswith("." + name) for other in others for name in layers)
    path = getattr(model, "name_or_path", None)
    return {
        "base_model_name_or_path": path if isinstance(path, str) and path else None,
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "modules_to_save": modules_to_save or None,
        # a list matches dotted ends too; if it would match more than the adapters, use an exact expression
        "target_modules": exact_expression(modules) if ambiguous and modules else modules,
        **({"target_parameters": [weight_of(name) for name in by_weight]} if by_weight else {}),
        **adapter_fields(
            {name: VARIANTS[layer.variant].saved_spec(layer) for name, layer in layers.items()}, set(by_weight)
        ),
    }


def adapter_fields(specs: Mapping[str, AdapterSpec], by_weight: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a config that describe these adapters of one variant, except the names of their modules.

    Modules in `by_weight` are listed in target_parameters, so patterns must match the names of their weights.
    """
    specs = {weight_of(name) if name in by_weight else name: spec for name, spec in specs.items()}
    method = VARIANTS[next(iter(specs.values())).variant].peft
    ranks = {name: spec.rank for name, spec in specs.items()}
    rank, rank_pattern = _default_and_pattern(ranks)
    fields = {
        "peft_type": method.peft_type,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        method.dropout: max(spec.dropout for spec in specs.values()),
        method.init: True,
        **method.flags,
        **method.fields,
    }
    if method.patterned or rank_pattern:
        fields["rank_pattern"] = rank_pattern
    if method.scaled:
        use_rslora = all(spec.use_rslora for spec in specs.values())
        # if only some layers use rsLoRA, the scale of every layer is written as alpha / rank
        alphas = {
            name: _plain_number(spec.alpha * (math.sqrt(spec.rank) if spec.use_rslora and not use_rslora else 1))
            for name, spec in specs.items()
        }
        alpha, alpha_pattern = _default_and_pattern(alphas)
        fields |= {"lora_alpha": alpha, "alpha_pattern": alpha_pattern, "use_rslora": use_rslora}
    return fields


def _default_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common of `values`, and a rank_pattern or alpha_pattern with the others."""
    ((default, _),) = Counter(values.values()).most_common(1)
    return default, {exact_key(name): value for name, value in values.items() if value != default}


def exact_expression(names: Iterable[str]) -> str:
    """A regular expression for target_modules that matches these names and no others."""
    return "|".join(re.escape(name) for name in names)


def exact_key(name: str) -> str:
    """A key of rank_pattern or alpha_pattern that matches this name and no longer one."""
    return "^" + re.escape(name)


def is_unambiguous(name: str, others: Iterable[str], variant: Variant) -> bool:
    """Whether `name` in modules_to_save matches no other module in PEFT, and prevents no adapter on another one.

    PEFT matches every module whose name ends with `name`, even within a component of the name and inside PEFT's own
    layers of `variant`, and also reads `name` as a regular expression.
    """
    if set(name) & set(r"^$*+?{}[]\|()"):
        return False
    around = re.compile(rf"(^|.*\.){name}($|\..*)")
    own = [part.key.removesuffix(".weight") for part in variant.parts if part.key is not None]
    inside = [end for stem in (*own, variant.peft.dropout) for end in (stem, f"{stem}.default")]
    return not any(
        other != name and (other.endswith(name) or around.match(other)) for other in (*others, "base_layer", *inside)
    )


def _plain_number(value: float) -> int | float:
    return int(value) if value == int(value) else value
