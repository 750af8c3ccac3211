"""Selects the modules of a model that `inject` replaces, by PEFT's rules for names, and refuses unsuitable ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from types import MethodType

from torch import nn

from cotolora.bases import is_conv1d, is_dense, why_no_linear_map, why_not_adaptable
from cotolora.groups import plain_name
from cotolora.matching import Targets, checked_names, dotted_ends, taking, why_not_whole, with_parents
from cotolora.wording import listed, shown, some_of

logger = logging.getLogger("cotolora")

HEADS = ("score", "classifier")  # the names that PEFT's SEQ_CLS looks for, in this order


def match_linears(
    model: nn.Module,
    targets: Targets,
    exclude: Targets | None = None,
    trainable: Targets = (),
    unfit: dict[str, str] | None = None,
) -> dict[str, list[str]]:
    """The linear modules that `inject` would replace: the first name of each, in module order, with all its names.

    The first name is the one in the unwrapped model; the list holds names for `get_submodule`. A module that cannot be
    replaced raises, or is added to `unfit` with the reason if that is given.

    Raises:
        ValueError: as `inject`.
    """
    targets = checked_names("targets", targets)
    exclude = checked_names("exclude", () if exclude is None else exclude)
    trainable = checked_names("trainable", trainable)
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    takes, excludes = taking("targets", targets), taking("exclude", exclude)
    trains = taking("trainable", trainable)
    modules = dict(model.named_modules(remove_duplicate=False))
    inside: set[nn.Module] = set()  # modules inside targets, which stay part of their base
    output = _output_embedding(model) if everything else None
    head = _classification_head(model) if everything else set()
    raw_names_of: dict[nn.Module, list[str]] = {}
    for raw_name, module in modules.items():
        raw_names_of.setdefault(module, []).append(raw_name)

    found, no_maps, of_head = {}, {}, []
    for module, raw_names in raw_names_of.items():
        names = [plain_name(raw_name) for raw_name in raw_names]
        if not everything and not any(map(takes, names)):
            continue
        if names == [""] or (exclude and any(map(excludes, names))):
            continue
        if module in inside:
            continue
        if not isinstance(module, nn.Linear) and not is_conv1d(module) and (everything or why_not_adaptable(module)):
            if not isinstance(targets, str) and not list(module.children()) and list(module.parameters()):
                raise ValueError(
                    f"targets must match only linear modules; {names[0]} is a {type(module).__name__}; "
                    f"leave it out with exclude=[{names[0]!r}]"
                )
            continue
        if any(trains(parent) for name in names for parent in with_parents(name)):
            if everything:
                continue
            raise ValueError(f"targets and trainable must not overlap; both match {names[0]}")
        if module is output:
            continue
        if module in head:
            of_head.append(names[0])
            continue
        if everything and (reason := why_no_linear_map(module)):
            no_maps[names[0]] = reason
            continue
        if reason := why_not_target(raw_names, modules):
            if unfit is None:
                end = _end_of_its_kind(names[0], modules)
                raise ValueError(f"{names[0]} {reason}; exclude=[{end!r}] leaves it out")
            unfit[names[0]] = reason
        inside.update(set(module.modules()) - {module})
        found[names[0]] = raw_names
    if no_maps:
        reason = next(iter(no_maps.values())).removeprefix("got ")
        logger.warning(
            "all-linear leaves out modules that do not map in_features to out_features: %s; the first is %s",
            some_of(no_maps),
            reason,
        )
    if of_head:
        logger.warning(
            "all-linear leaves out the classification head, which stays frozen: %s; from_pretrained initialises it at "
            "random unless the checkpoint has it, so train it in full: trainable=[%r]",
            some_of(of_head),
            next(name for name in HEADS if hasattr(model, name)),
        )
    _refuse_missing(model, targets, found)
    return found


def _end_of_its_kind(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The shortest dotted end of `name`, a module that cannot be adapted, that matches no linear module that can."""
    able = {
        end
        for raw_name, module in modules.items()
        if raw_name and (isinstance(module, nn.Linear) or is_conv1d(module)) and not why_not_target([raw_name], modules)
        for end in dotted_ends(plain_name(raw_name))
    }
    return next((end for end in reversed(dotted_ends(name)) if end not in able), name)


def why_not_target(raw_names: Iterable[str], modules: Mapping[str, nn.Module]) -> str:
    """Why a module cannot become an adapter in all of its places, as "must …"; empty if it can."""
    for raw_name in raw_names:
        parent, _, leaf = raw_name.rpartition(".")
        module = modules[raw_name]
        if leaf == "_orig_mod":
            return (
                "must not be compiled by itself: torch.compile keeps calling the module it was given, so an adapter "
                "there would be ignored; call inject before torch.compile"
            )
        if isinstance(modules[parent], nn.MultiheadAttention):
            return (
                "must not be adapted: nn.MultiheadAttention passes its weight to a functional and never calls it, so "
                "an adapter there would be ignored"
            )
        if reason := why_not_adaptable(module):
            return f"must be a module that maps in_features to out_features; {reason}"
        # a base that is not dense is called, so it keeps its forward in any case
        if is_dense(module) and (reason := why_forward_is_not_its_own(module)):
            return f"must keep its own forward; {reason}"
    return ""


def why_forward_is_not_its_own(module: nn.Module) -> str:
    """Why replacing `module` would lose another forward that was set on it; empty if it would not."""
    # accelerate sets the bound method again when it removes a hook: that counts as the module's own forward
    if module.__dict__.get("forward", own := MethodType(type(module).forward, module)) == own:
        return ""
    return (
        "something replaced it (accelerate's hooks do), and the replacement would be lost with the module; "
        "remove the hook first"
    )


def _refuse_missing(model: nn.Module, targets: Targets, found: dict[str, list[str]]) -> None:
    if isinstance(targets, str):
        missing = [] if found else [targets]
    else:
        taken = {end for names in found.values() for name in names for end in dotted_ends(plain_name(name))}
        missing = [target for target in targets if target not in taken]
        if not targets:
            raise ValueError(f"targets must hold at least one name; got {shown(targets)}")
    if missing:
        linears = [name for name, module in model.named_modules() if name and not why_not_adaptable(module)]
        if ends := sorted({plain_name(name).rpartition(".")[2] for name in linears}):
            which = f"; its linear modules end in {listed(ends)}"
        elif not why_not_adaptable(model):
            which = ": it is a linear module itself, which CoToLoRALinear.from_linear adapts"
        else:
            kinds = {type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))}
            which = f", which has none that can be adapted: its parameters are in {listed(sorted(kinds))}"
        part = _matched_in_part("targets", targets, linears)
        raise ValueError(f"targets {listed(missing)} match no linear module in {type(model).__name__}{which}{part}")


def parameters_taken(model: nn.Module, trainable: Targets) -> set[nn.Parameter]:
    """The parameters that `trainable` matches, by their own names or by those of modules around them."""
    parameters = [
        (plain_name(name), parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point() or parameter.is_complex()  # others cannot have a gradient
    ]
    if not trainable:
        return set()
    by_end: dict[str, set[nn.Parameter]] = {}  # by ends of their names and of those of modules around them
    for name, parameter in parameters:
        for part in with_parents(name):
            for end in [part] if isinstance(trainable, str) else dotted_ends(part):
                by_end.setdefault(end, set()).add(parameter)
    takes = taking("trainable", trainable)
    found = set().union(*(taken for end, taken in by_end.items() if takes(end)))
    if isinstance(trainable, str):
        missing = [] if found else [trainable]
    else:
        missing = [target for target in trainable if target not in by_end]
    if missing:
        children = [name for name, _ in model.named_children()]
        raise ValueError(
            f"trainable {listed(missing)} matches no parameter in {type(model).__name__}; its top modules are "
            f"{listed(children)}{_matched_in_part('trainable', trainable, (name for name, _ in parameters))}"
        )
    return found


def _matched_in_part(argument: str, targets: Targets, names: Iterable[str]) -> str:
    return why_not_whole(argument, targets, map(plain_name, names)) if isinstance(targets, str) else ""


def _output_embedding(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _classification_head(model: nn.Module) -> set[nn.Module]:
    """The modules of the head of a transformers ``…ForSequenceClassification``, which PEFT's SEQ_CLS leaves out."""
    if not any(kind.__name__.endswith("ForSequenceClassification") for kind in type(model).__mro__):
        return set()
    head = next((getattr(model, name) for name in HEADS if hasattr(model, name)), None)
    return set(head.modules()) if isinstance(head, nn.Module) else set()
