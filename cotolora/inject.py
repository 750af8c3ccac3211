"""Puts adapters into a model and takes them out again; matches names by PEFT's rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext

import torch
from torch import nn

from cotolora import checks
from cotolora.bases import is_peft_module
from cotolora.coverage import warn_of_frozen_share
from cotolora.groups import adapters, plain_name, unwrap, wrappers
from cotolora.hooks import (
    block_fast_path,
    hooks_of,
    move_hooks,
    name_missing_adapters,
    replace_module,
    restore_fast_path,
    restore_load,
    set_hooks,
)
from cotolora.linear import CoToLoRALinear
from cotolora.matching import (
    Targets,
    checked_names,
    compile_patterns,
    first_match,
    warn_of_idle_keys,
)
from cotolora.quantised import allow_training, disallow_training
from cotolora.spec import AdapterSpec
from cotolora.stacking import unstack
from cotolora.targets import match_linears, parameters_taken, why_forward_is_not_its_own
from cotolora.training.unreached import watch
from cotolora.variants import VARIANTS
from cotolora.weights import warn_of_uncalled

logger = logging.getLogger("cotolora")


def inject(
    model: nn.Module,
    targets: Targets = "all-linear",
    *,
    rank: int = 8,
    alpha: float = 16.0,
    exclude: Targets | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    trainable: Targets = (),
    dropout: float = 0.0,
    use_rslora: bool = False,
    variant: str = "lora",
    init: str = "kaiming",
) -> dict[str, CoToLoRALinear]:
    r"""Replaces linear modules of `model` by `CoToLoRALinear`, in place, and freezes everything else.

    Names are matched as in PEFT. A list holds whole names or their dotted ends (``"q_proj"`` matches
    ``layers.0.q_proj``, not ``not_q_proj``). A string is a regular expression for the whole name, or "all-linear":
    every ``nn.Linear``, subclasses included, and transformers ``Conv1D``, except modules that `trainable` matches and
    the output embedding of a transformers model. "all-linear" also leaves out, and logs, the head of a
    ``…ForSequenceClassification`` (its `score` or `classifier`, as for PEFT's SEQ_CLS), which stays frozen, and
    subclasses whose forward does not map in_features to out_features (routers of experts). If `targets` matches its
    name, any other module with integer `in_features` and `out_features` is replaced too: `CoToLoRALinear.from_linear`
    says how a base without a dense weight is handled. Modules inside such a base are never targets.

    A module with several names becomes one adapter, named after the first. `save_adapter` refuses such an adapter,
    because PEFT would adapt only the first place, unless all names lead to one place, as in a block that is held twice.
    Hooks move to the new layer; a module that stays as a base keeps its state dict hooks. Weights are shared, not
    copied; tied weights stay tied. Names are those of the unwrapped model, as returned by `adapters`.

    Trainer accepts a quantised transformers model from then on, until `eject`: Trainer asks the model's quantizer,
    ``model.hf_quantizer``, whether there is something to train, and the quantizer now answers yes. Inject into the
    model that Trainer gets, which has the quantizer, not into a part of it.

    If most weights outside the embeddings belong to no linear module and stay frozen, such as 3-dimensional expert
    parameters, a warning says which and how many.

    Args:
        model: the model; changed in place, and unchanged if anything raises.
        targets: which modules to replace.
        rank, alpha, dropout, use_rslora, variant, init: settings of each layer, see `CoToLoRALinear`.
        exclude: modules to leave alone, by the same rules; checked first.
        rank_pattern, alpha_pattern: other ranks and alphas by name: the first key k for which
            ``re.match(rf"(.*\.)?({k})$", name)`` holds decides. Keys that match no target are listed in a warning.
        trainable: modules or parameters to train in full alongside the adapters (a new classifier head), by the
            rules of `targets`.

    Returns:
        the new layers by name, in module order.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a target or `trainable` matches nothing, or both match the same parameter; a match cannot
            be adapted (the message says why and what to exclude); the model has adapters already, ours or PEFT's, or is
            inside DistributedDataParallel, which would not synchronise new ones; an option is out of its range.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> list(inject(model, ["0"], rank=2))
    ['0']
    """
    model = plain_model(model)
    trainable = checked_names("trainable", trainable)
    matched = match_linears(model, targets, exclude, trainable)
    trained = parameters_taken(model, trainable)
    _refuse_overlap({name: model.get_submodule(raw_names[0]) for name, raw_names in matched.items()}, trained)
    ranks = compile_patterns("rank_pattern", rank_pattern)
    alphas = compile_patterns("alpha_pattern", alpha_pattern)
    for key, value in ranks.items:
        checks.size(f"rank_pattern of {key!r}", value)
    for key, value in alphas.items:
        checks.finite(f"alpha_pattern of {key!r}", value)
    warn_of_idle_keys(ranks, alphas, matched)
    specs = {
        name: AdapterSpec(
            first_match(ranks, name, rank), first_match(alphas, name, alpha), dropout, use_rslora, variant, init
        )
        for name in matched
    }
    layers = install(model, specs, trained)
    warn_of_frozen_share(model)
    return layers


def install(
    model: nn.Module,
    specs: Mapping[str, AdapterSpec],
    trained: Iterable[nn.Parameter] = (),
    fill: Callable[[dict[str, CoToLoRALinear]], None] | None = None,
) -> dict[str, CoToLoRALinear]:
    """Puts adapters into a model that has none and freezes everything else; changes nothing if anything raises.

    Args:
        model: changed in place; if anything raises, its modules, hooks and ``requires_grad`` flags are restored.
        specs: the settings of each adapter, by the first name of its module in the unwrapped model.
        trained: parameters that are trained alongside the adapters.
        fill: called with the new layers by name before they are put into the model, to write into their parameters.

    Returns:
        the new layers by name.

    Raises:
        TypeError: `model` is not a module, or a module of `specs` cannot be adapted.
        ValueError: `model` has adapters, ours or PEFT's, or is inside DistributedDataParallel; a spec does not fit its
            module.
    """
    model, trained = plain_model(model), set(trained)
    raw_names_of: dict[nn.Module, list[str]] = {}
    for raw_name, module in model.named_modules(remove_duplicate=False):
        raw_names_of.setdefault(module, []).append(raw_name)
    linears = {plain_name(raw_names[0]): module for module, raw_names in raw_names_of.items()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with ExitStack() as undo:
        undo.callback(_restore_requires_grad, flags)
        layers = {name: CoToLoRALinear.from_spec(linears[name], spec) for name, spec in specs.items()}
        for variant in {spec.variant for spec in specs.values()}:
            VARIANTS[variant].share([layer for layer in layers.values() if layer.variant == variant])
        if fill is not None:
            fill(layers)
        _set_requires_grad({parameter: parameter in trained for parameter in flags})
        for name, layer in layers.items():
            linear = linears[name]
            undo.callback(set_hooks, linear, hooks_of(linear))
            move_hooks(linear, layer)
            for raw_name in raw_names_of[linear]:
                undo.callback(replace_module, model, raw_name, linear)
                replace_module(model, raw_name, layer)
        undo.callback(restore_fast_path, model)
        block_fast_path(model)
        undo.callback(restore_load, model)
        name_missing_adapters(model)
        undo.callback(disallow_training, model)
        allow_training(model)
        undo.pop_all()
    name_and_watch(layers)
    return layers


def name_and_watch(layers: Mapping[str, CoToLoRALinear]) -> None:
    """Tells the layers of a model their names in it, and watches whether they receive gradients."""
    told: set[str] = set()
    for name, layer in layers.items():
        layer._name, layer._told = name, told
    watch(layers)


def eject(model: nn.Module, merge: bool = True) -> dict[str, nn.Module]:
    """Puts plain modules back in place of the adapters; the reverse of `inject`.

    Frozen parameters stay frozen: call ``model.requires_grad_(True)`` to train the model in full.

    Args:
        model: changed in place, and unchanged if anything raises.
        merge: merge the enabled adapters into new weights; False gives back the original weights. Adapters that no
            forward has called are listed in a warning: a model that reads their weights without calling the layers has
            computed without the adapters, and merging changes its outputs.

    Returns:
        the plain modules by name, in module order.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no adapters, or is one itself (which `to_linear` turns into a plain module), or
            the forward of an adapter was replaced.
        RuntimeError: `merge` is True, and an enabled adapter's base has no dense weight or its `enabled` is a row mask.
    """
    layers = adapters(model)
    checks.flag("merge", merge)
    if not layers:
        raise ValueError(f"model must have adapters; {type(model).__name__} has none")
    model = unwrap(model)
    if model in layers.values():
        raise ValueError("model must hold adapters; it is one itself (call its to_linear)")
    for name, layer in layers.items():
        if reason := why_forward_is_not_its_own(layer):
            raise ValueError(f"{name} must have its own forward to be ejected; {reason}")
    shared = _shared_weights(model, layers)
    plain = {id(layer): layer.to_linear(merge) for layer in layers.values()}
    unmerged = {name: layer for name, layer in layers.items() if merge and layer.base is None and not layer.merged}
    warn_of_uncalled([name for name, layer in unmerged.items() if layer._merges_uncalled(plain[id(layer)].weight)])  # type: ignore[arg-type]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, CoToLoRALinear):
            replace_module(model, name, plain[id(module)])
    for layer in layers.values():
        move_hooks(layer, plain[id(layer)])
    unstack(model)
    restore_fast_path(model)
    restore_load(model)
    disallow_training(model)
    for name, (weight, others) in shared.items():
        if plain[id(layers[name])].weight is not weight:
            logger.warning("%s shared its weight with %s; after merging it has its own weight", name, ", ".join(others))
    return {name: plain[id(layer)] for name, layer in layers.items()}


def plain_model(model: nn.Module) -> nn.Module:
    """`model` without its wrappers; raises ValueError unless it can get adapters."""
    if existing := adapters(model):
        raise ValueError(f"model must have no adapters yet; it has {len(existing)} (eject them first)")
    if pefts := next(((name, module) for name, module in model.named_modules() if is_peft_module(module)), None):
        name, module = pefts
        raise ValueError(
            f"model must hold no PEFT modules; {plain_name(name) or 'it'} is a PEFT {type(module).__name__}: call "
            "cotolora.integrations.peft.from_peft(model), which converts its LoRA layers to this library's, or "
            "CoTo(model, total_steps), which switches PEFT's layers directly, or first PEFT's unload(), which removes "
            "them"
        )
    if any(isinstance(wrapper, nn.parallel.DistributedDataParallel) for wrapper in wrappers(model)):
        raise ValueError(
            "model must be wrapped in DistributedDataParallel after inject, because DDP synchronises only parameters "
            "that exist when it is constructed; pass the inner module and wrap it again"
        )
    return unwrap(model)


def _set_requires_grad(flags: Mapping[nn.Parameter, bool]) -> None:
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)


def _restore_requires_grad(flags: Mapping[nn.Parameter, bool]) -> None:
    for parameter, flag in flags.items():
        # the flag of a parameter that was made in inference mode can be set only in that mode
        with torch.inference_mode() if parameter.is_inference() else nullcontext():
            parameter.requires_grad_(flag)


def _refuse_overlap(linears: dict[str, nn.Module], trained: set[nn.Parameter]) -> None:
    for name, linear in linears.items():
        for key, parameter in linear.named_parameters():
            if parameter in trained:
                raise ValueError(
                    f"targets and trainable must not overlap; both match {name}.{key}, by this name or a tied one"
                )


def _shared_weights(model: nn.Module, layers: dict[str, CoToLoRALinear]) -> dict[str, tuple[nn.Parameter, list[str]]]:
    """Base weights of adapters that other modules of the model hold as well, with their names there."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, plain_name(f"{name}.{key}" if name else key)))
    shared = {}
    for name, layer in layers.items():
        if layer.base is not None:
            continue
        base = layer._base_weight()
        if others := [owner for module, owner in owners.get(id(base), []) if module is not layer]:
            shared[name] = base, others
    return shared
