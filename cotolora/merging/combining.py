"""Shared parts of all merging functions: checks of states and weights, and the loop over the adapters."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cotolora.checks import entries, finite
from cotolora.merging.states import AdapterState, Factors
from cotolora.wording import listed, shown

StateLike = AdapterState | str | os.PathLike[str] | nn.Module
Weights = Sequence[float] | None


def as_state(state: StateLike) -> AdapterState:
    """The `AdapterState` of a model or a saved directory; an `AdapterState` is returned as it is.

    Raises:
        ValueError: `state` is a plain mapping of tensors, which does not contain the scale of ``B A``; or as
            `AdapterState.from_model` and `AdapterState.from_directory`.
        TypeError: `state` is anything else.
    """
    return named_state("state", state)


def named_state(argument: str, state: StateLike) -> AdapterState:
    """`as_state` for an argument with the name `argument`."""
    if isinstance(state, AdapterState):
        return state
    try:
        if isinstance(state, nn.Module):
            return AdapterState.from_model(state)
        if isinstance(state, (str, os.PathLike)):
            return AdapterState.from_directory(state)
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{argument}: {error}") from error
    if isinstance(state, Mapping):
        raise ValueError(
            f"{argument} must contain the scale of B A, which a mapping of tensors does not; "
            f"use AdapterState.from_tensors(tensors, alpha=...); got {shown(state)}"
        )
    raise TypeError(
        f"{argument} must be an AdapterState, a directory or a model; got {type(state).__name__} {shown(state)}"
    )


def checked_states(
    states: Sequence[StateLike], weights: Weights, equal: float | None = None
) -> tuple[list[AdapterState], list[float]]:
    """Reads `states` and checks that they fit one base model; `weights` as floats, by default all `equal` or 1 / n.

    Raises:
        ValueError: the states or the weights do not fit together; the message says what differs.
        TypeError: `states` is a single state, or not a sequence.
    """
    if isinstance(states, (AdapterState, str, os.PathLike, nn.Module, Mapping)):
        raise TypeError(f"states must be a sequence of states; got a single {type(states).__name__}, {shown(states)}")
    given = entries("states", states, "a sequence of states", empty=False)
    found = [named_state(f"states[{i}]", state) for i, state in enumerate(given)]
    checked = checked_weights(weights, len(found), "states", equal)
    first, *others = found
    for i, other in enumerate(others, 1):
        _check_same("adapters", i, *map(_sizes, (first, other)))
        _check_same("tensors outside the adapters", i, *map(_shapes, (first.other_tensors, other.other_tensors)))
    if first.other_tensors and sum(checked) == 0:
        raise ValueError(f"weights must not sum to 0, to average {sorted(first.other_tensors)}; got {checked}")
    return found, checked


def _sizes(state: AdapterState) -> dict[str, tuple[int, ...]]:
    return {name: (len(part.lora_b), part.lora_a.shape[1]) for name, part in state.factors.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _check_same(what: str, i: int, first: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> None:
    if first.keys() != other.keys():
        alone = {0: first.keys() - other.keys(), i: other.keys() - first.keys()}
        found = ", ".join(f"only states[{at}] has {listed(sorted(names))}" for at, names in alone.items() if names)
        raise ValueError(f"states must hold the same {what}; {found}")
    for name, shape in first.items():
        if shape != other[name]:
            raise ValueError(
                f"states must fit one base model; {name} is {shape} in states[0] and {other[name]} in states[{i}]"
            )


def checked_weights(weights: Weights, count: int, what: str, equal: float | None = None) -> list[float]:
    """`weights` as floats, or `count` equal ones.

    Raises:
        ValueError: there is another number of weights, or one is not finite.
    """
    if weights is None:
        return [1 / count if equal is None else equal] * count
    must = f"{count} finite numbers, one for each of {what}"
    try:
        checked = [finite("weights", weight) for weight in entries("weights", weights, must)]
    except (TypeError, ValueError):
        checked = []
    if len(checked) != count:
        raise ValueError(f"weights must be {must}; got {shown(weights)}")
    return checked


def check_same_rank(states: list[AdapterState]) -> None:
    """Raises ValueError with the first adapter whose ranks differ."""
    for name, part in states[0].factors.items():
        if len(ranks := [state.factors[name].rank for state in states]) != ranks.count(part.rank):
            raise ValueError(f"ranks of the states must agree to add factors; {name} has {ranks} (mix accepts any)")


def check_same_scale(states: list[AdapterState]) -> None:
    """Raises ValueError with the first adapter whose ranks or scales differ."""
    check_same_rank(states)
    for name, part in states[0].factors.items():
        scales = [state.factors[name].scale for state in states]
        if not all(math.isclose(scale, part.scale) for scale in scales):
            raise ValueError(f"scales of the states must agree to add factors; {name} has {scales} (mix accepts any)")


def by_name(states: list[AdapterState]) -> Iterator[tuple[str, list[Factors]]]:
    """For each adapter, its name and its factors in all states, on the first one's device and in the widest dtype."""
    for name in tqdm(states[0].factors, disable=None, delay=3, desc="merging"):
        parts = [state.factors[name] for state in states]
        device, dtype = parts[0].lora_a.device, reduce(torch.promote_types, (part.lora_a.dtype for part in parts))
        factors = [(part.lora_a.to(device, dtype), part.lora_b.to(device, dtype)) for part in parts]
        yield name, [dataclasses.replace(p, lora_a=a, lora_b=b) for p, (a, b) in zip(parts, factors, strict=True)]


def merged(
    states: list[AdapterState], weights: list[float], combine: Callable[[list[Factors]], Factors]
) -> AdapterState:
    """A state whose adapters are made by `combine`; other tensors that were trained with them are averaged."""
    factors = {name: combine(parts) for name, parts in by_name(states)}
    other_tensors = dict(states[0].other_tensors)
    for key, tensor in other_tensors.items():
        if tensor.is_floating_point():  # counters and flags have no mean
            same = [state.other_tensors[key].to(tensor.device) for state in states]
            other_tensors[key] = weighted_sum([weight / sum(weights) for weight in weights], same)
    kept = dict(states[0].kept)
    if any(state.kept.get("base_model_name_or_path") != kept.get("base_model_name_or_path") for state in states):
        kept["base_model_name_or_path"] = None
    return AdapterState(factors, other_tensors, kept)


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """``Σ λᵢ tᵢ``."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total
