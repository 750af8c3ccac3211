"""Puts adapters into a model and takes them out again, by PEFT's rules for names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from cotolora.groups import adapters, unwrap
from cotolora.linear import CoToLoRALinear, is_conv1d, why_not_adaptable

logger = logging.getLogger("cotolora")

Targets = str | Sequence[str]

# everything that nn.Module.register_*_hook writes to
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


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

    Names are matched as PEFT matches them: a list holds whole names or their dotted ends (``"q_proj"`` takes
    ``layers.0.q_proj``, not ``not_q_proj``); a string is a regular expression for the whole name, or
    "all-linear": every ``nn.Linear`` and transformers ``Conv1D`` except what `trainable` takes and, in a
    transformers model, the output embedding.

    A module under several names becomes one adapter, named after the first. Forward and backward
    hooks move to the new layer. Weights are shared, not copied; tied weights stay tied.

    Args:
        model: the model; changed in place, and unchanged if anything raises.
        targets: which modules to replace.
        rank, alpha, dropout, use_rslora, variant, init: of each layer, see `CoToLoRALinear`.
        exclude: modules to leave alone; same rules, checked first.
        rank_pattern, alpha_pattern: other ranks and alphas by name: the first key k for which
            ``re.match(rf"(.*\.)?({k})$", name)`` holds decides.
        trainable: modules or parameters to train in full besides the adapters (a new classifier head); the
            rules of `targets`.

    Returns:
        the new layers by name, in module order.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a target or `trainable` matches nothing; a match cannot be adapted (the message
            says why and what to exclude); the model has adapters already; an option is out of its range.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> list(inject(model, ["0"], rank=2))
    ['0']
    """
    if existing := adapters(model):
        raise ValueError(f"model must have no adapters yet; it has {len(existing)} (eject them first)")
    model = unwrap(model)
    matched = match_linears(model, targets, exclude, trainable)
    linears = {name: model.get_submodule(name) for name in matched}
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        trained = _trainable_parameters(model, trainable)
        layers = {
            name: CoToLoRALinear.from_linear(
                linear,
                _by_pattern(rank_pattern, name, rank),
                _by_pattern(alpha_pattern, name, alpha),
                dropout=dropout,
                use_rslora=use_rslora,
                variant=variant,
                init=init,
            )
            for name, linear in linears.items()
        }
    except BaseException:
        for parameter, flag in frozen.items():
            parameter.requires_grad_(flag)
        raise

    for parameter in frozen:
        parameter.requires_grad_(parameter in trained)
    for name, layer in layers.items():
        _move_hooks(linears[name], layer)
        for alias in matched[name]:
            _replace(model, alias, layer)
    _block_fast_path(model)
    return layers


def eject(model: nn.Module, merge: bool = True) -> dict[str, nn.Module]:
    """Puts plain modules back in place of the adapters; the reverse of `inject`.

    What was frozen stays frozen: call ``model.requires_grad_(True)`` to train it in full.

    Args:
        model: changed in place, and unchanged if anything raises.
        merge: fold the enabled adapters into new weights; False gives back the original weights.

    Returns:
        the plain modules by name, in module order.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no adapters.
        RuntimeError: `merge` is asked for and an adapter's `enabled` is a row mask.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError(f"model must have adapters; {type(model).__name__} has none")
    model = unwrap(model)
    tied = _shared_weights(model, layers) if merge else {}
    plain = {id(layer): layer.to_linear(merge) for layer in layers.values()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, CoToLoRALinear):
            _replace(model, name, plain[id(module)])
    for layer in layers.values():
        _move_hooks(layer, plain[id(layer)])
    _restore_fast_path(model)
    for name, others in tied.items():
        logger.warning("%s shared its weight with %s; merged, it has a weight of its own", name, ", ".join(others))
    return {name: plain[id(layer)] for name, layer in layers.items()}


def trainable_report(model: nn.Module) -> str:
    """How much of `model` trains, in PEFT's words; give it to a logger or print it.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = inject(model, ["0"], rank=1)
    >>> trainable_report(model)
    'trainable params: 8 || all params: 28 || trainable%: 28.5714'
    """
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = 100 * trained / every if every else 0.0
    return f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {share:.4f}"


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, in module order."""
    return [parameter for layer in adapters(model).values() for parameter in (layer.lora_a, layer.lora_b)]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer in which every B learns `ratio` times faster than the rest.

    Args:
        model: a model with adapters.
        lr: learning rate of A and of whatever else trains.
        ratio: learning rate of B over `lr`.

    Returns:
        two groups with "params" and "lr".

    Raises:
        ValueError: `model` has no adapters; `lr` or `ratio` is not positive.

    Source: LoRA+, Hayou et al. 2024, section 4 (arXiv:2402.12354).
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value!r}")
    layers = adapters(model)
    if not layers:
        raise ValueError(f"model must have adapters; {type(model).__name__} has none (call inject first)")
    fast = [layer.lora_b for layer in layers.values() if layer.lora_b.requires_grad]
    known = {id(parameter) for parameter in fast}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": rest, "lr": lr}, {"params": fast, "lr": lr * ratio}]


def matches(name: str, targets: Targets) -> bool:
    """Whether a module's name is a target: a list holds names or dotted ends, a string is a full regular expression.

    >>> matches("layers.0.q_proj", ["q_proj"]), matches("layers.0.not_q_proj", ["q_proj"])
    (True, False)
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def match_linears(
    model: nn.Module, targets: Targets, exclude: Targets | None = None, trainable: Targets = ()
) -> dict[str, list[str]]:
    """The linear modules that `inject` would replace: first name of each, in module order, and all its names.

    Raises:
        ValueError: as `inject`.
    """
    for argument, value in (("targets", targets), ("exclude", exclude or ()), ("trainable", trainable)):
        _check_names(argument, value)
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    modules = dict(model.named_modules(remove_duplicate=False))
    head = _output_embedding(model) if everything else None
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names_of.setdefault(module, []).append(name)

    found = {}
    for module, names in names_of.items():
        if not everything and not any(matches(name, targets) for name in names):
            continue
        if names == [""] or (exclude and any(matches(name, exclude) for name in names)):
            continue
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            if not isinstance(targets, str) and not list(module.children()) and list(module.parameters()):
                raise ValueError(
                    f"targets must name linear modules; {names[0]} is a {type(module).__name__}; "
                    f"leave it out with exclude=[{names[0]!r}]"
                )
            continue
        if any(matches(parent, trainable) for name in names for parent in _with_parents(name)):
            if everything:
                continue
            raise ValueError(f"targets and trainable must not overlap; both take {names[0]}")
        if module is head:
            continue
        for name in names:
            _refuse_unadaptable(name, module, modules)
        found[names[0]] = names
    _refuse_missing(model, targets, found)
    return found


def _check_names(argument: str, value: Targets) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{argument} must be a list of names or a regular expression; got {value!r} ({error})"
            ) from None
    elif not isinstance(value, Iterable) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{argument} must be a list of names or a regular expression; got {value!r}")


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _output_embedding(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _refuse_unadaptable(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> None:
    parent, _, leaf = name.rpartition(".")
    advice = f"leave it out with exclude=[{leaf!r}]"
    if isinstance(modules[parent], nn.MultiheadAttention):
        raise ValueError(
            f"{name} must not be adapted: nn.MultiheadAttention hands its weight to a functional and never "
            f"calls it, so an adapter there would be ignored; {advice}"
        )
    if reason := why_not_adaptable(module):
        raise ValueError(f"{name} must be an nn.Linear or a transformers Conv1D; {reason}; {advice}")
    if "forward" in module.__dict__:
        raise ValueError(
            f"{name} must keep its own forward; something replaced it (accelerate's hooks do), and the "
            f"replacement would be lost; remove the hook first, or {advice}"
        )


def _refuse_missing(model: nn.Module, targets: Targets, found: dict[str, list[str]]) -> None:
    if isinstance(targets, str):
        missing = [] if found else [targets]
    else:
        taken = [name for names in found.values() for name in names]
        missing = [target for target in targets if not any(matches(name, [target]) for name in taken)]
        if not targets:
            raise ValueError("targets must name at least one module; got none")
    if missing:
        linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module))
        ends = sorted({name.rpartition(".")[2] for name in linears if name})
        raise ValueError(
            f"targets {missing} match no linear module in {type(model).__name__}; its linear modules end in {ends}"
        )


def _trainable_parameters(model: nn.Module, trainable: Targets) -> set[nn.Parameter]:
    """The parameters that `trainable` takes, by their own names or by those of modules around them."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    found = set()
    for target in [trainable] if isinstance(trainable, str) else trainable:
        rule = target if isinstance(trainable, str) else [target]
        taken = {p for name, p in parameters if any(matches(part, rule) for part in _with_parents(name))}
        if not taken:
            children = [name for name, _ in model.named_children()]
            raise ValueError(
                f"trainable [{target!r}] matches no parameter in {type(model).__name__}; its top modules are {children}"
            )
        found |= taken
    return found


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    # not setattr: Sequential, ModuleList and ModuleDict hold children under names that are no identifiers
    model.get_submodule(parent)._modules[leaf] = module


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    for name in _HOOKS:
        # the very same dictionary: a handle that the user kept removes its hook from it
        setattr(target, name, getattr(source, name))
    target._is_full_backward_hook = source._is_full_backward_hook


def _shared_weights(model: nn.Module, layers: dict[str, CoToLoRALinear]) -> dict[str, list[str]]:
    """Adapters whose base weight other parameters of the model share, with those parameters' names."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shared = {}
    for name, layer in layers.items():
        base = layer.weight if layer._original_weight is None else layer._original_weight
        if others := [owner for owner in owners.get(id(base), []) if owner != f"{name}.weight"]:
            shared[name] = others
    return shared


def _block_fast_path(model: nn.Module) -> None:
    """Keeps torch's fused encoder inference, which reads the weights past the layers, off what was adapted."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and adapters(module):
            module._cotolora_activation = module.activation_relu_or_gelu  # type: ignore[assignment]
            module.activation_relu_or_gelu = 0  # "neither": one of the conditions of the fused path
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and adapters(module):
            module._cotolora_nested = module.use_nested_tensor  # type: ignore[assignment]
            module.use_nested_tensor = False  # only the fused path can read nested tensors


def _restore_fast_path(model: nn.Module) -> None:
    for module in model.modules():
        for saved, attribute in (
            ("_cotolora_activation", "activation_relu_or_gelu"),
            ("_cotolora_nested", "use_nested_tensor"),
        ):
            if saved in module.__dict__:
                setattr(module, attribute, module.__dict__.pop(saved))
