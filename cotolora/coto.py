"""The strategy: owns a run's schedule and sets the gates of a model's adapters."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cotolora.checks import integer, one_of
from cotolora.groups import Unit, group_names, is_enabled, unwrap
from cotolora.schedule import NOT_GIVEN, Schedule, schedule_of
from cotolora.training.agreement import check_agreement
from cotolora.training.optimizer_state import keep_whole
from cotolora.training.reducer import JoinUnused
from cotolora.training.stepping import Together, before_each_step, unwrapped
from cotolora.training.switches import PeftSwitch, Switch, module_of, switches

logger = logging.getLogger("cotolora")


class CoTo:
    r"""Progressive activation of adapters: at optimizer step t each group is on with probability p(t).

    p rises from `initial_p` to 1 over the first `ramp` of the run (see `activation_probability`), so the
    run ends as ordinary LoRA. Masks are a pure function of the seed and the step (see `sample_mask`): the
    same on every rank and after every resume, whatever else draws random numbers.

    The constructor applies step 0. Gates change only in `step`, `set_step`, `load_state_dict` and
    `finish`, never between a forward and its backward, if these are called where a scheduler is stepped:

        coto = CoTo(model, total_steps=len(loader) * epochs)
        coto.attach(optimizer)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            coto.step()

    In `eval()` every adapter is on, whatever the gates say. A model has one CoTo: a second one finishes the first.

    It drives a PEFT model as well: any of PEFT's methods whose layers can be disabled one by one (LoRA, DoRA, HiRA,
    LoHa, OFT, …), with the masks that our own layers at the same places would have. The layers with an active adapter
    when the CoTo is made are the ones it switches.

    Args:
        model: a model with adapters, ours or PEFT's; may be wrapped by DistributedDataParallel or torch.compile.
        total_steps: optimizer steps of the run.
        schedule: when groups are on. Its fields may also be given one by one, instead:
        initial_p, ramp, shape, tilt, at_least_one, seed: see `Schedule`, where their defaults are.
        unit: what is switched as one: "layer" (adapters whose names agree up to their first number, such as
            ``model.layers.3``), "module" (each adapter) or a callable from name to key.
        gates: "host" (bools; an adapter that is off launches nothing and costs nothing) or "device" (int32
            tensors written in place, for CUDA graphs and whole-model compile).
        check_every: in a distributed run, compare seed, step, settings, groups and mask of all ranks in the
            constructor and in every n-th call of `step` or `set_step`; 0 is never. A small all-gather, so every
            rank must make these calls, with the same `check_every`: a rank that does not come keeps the others
            waiting until the timeout of the default process group. No part of the state.

    Attributes:
        groups: adapter names by group, in module order.
        mask: bool ``[len(groups)]`` on the CPU, what is on now.
        p: the schedule's probability now.
        current_step: optimizer steps done.
        schedule: the `Schedule`.
        total_steps: optimizer steps of the run.

    Raises:
        TypeError: `model` is not a module, or `unit` neither a string nor a callable.
        ValueError: the model has no adapters, merged ones or some of PEFT's that must not be switched (PiSSA: off would
            mean a residual, not the pretrained weight), or an argument is out of its range.
        RuntimeError: from the constructor, `step` and `set_step`, on every rank: `check_every` has found ranks
            that differ; names them, in what, and the values here.

    Source: Zhuang et al. 2025, section 3 (arXiv:2506.05713).
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        schedule: Schedule | None = None,
        *,
        initial_p: float = NOT_GIVEN,
        ramp: float = NOT_GIVEN,
        shape: str = NOT_GIVEN,
        unit: Unit = "layer",
        tilt: float = NOT_GIVEN,
        at_least_one: bool = NOT_GIVEN,
        seed: int = NOT_GIVEN,
        gates: str = "host",
        check_every: int = 0,
    ) -> None:
        self._layers = switches(model)
        if not self._layers:
            raise ValueError(f"model must have adapters; {type(model).__name__} has none (call inject first)")
        if merged := [name for name, layer in self._layers.items() if layer.merged]:
            raise ValueError(f"model must have no merged adapters, which cannot train; merged: {merged}")
        one_of("gates", gates, ("host", "device"))
        if gates == "device" and any(isinstance(layer, PeftSwitch) for layer in self._layers.values()):
            raise ValueError("gates must be 'host' on a PEFT model, whose switch is a bool of the host; got 'device'")
        self.groups: dict[Hashable, list[str]] = group_names(self._layers, unit)
        self.schedule = schedule_of(
            schedule,
            initial_p=initial_p,
            ramp=ramp,
            shape=shape,
            tilt=tilt,
            at_least_one=at_least_one,
            seed=seed,
        )
        self.total_steps = integer("total_steps", total_steps)
        self._check_every, self._calls = integer("check_every", check_every, 0), 0
        self.current_step = 0
        self.p = 0.0
        # on the CPU by name, here and below: the user may have set another default device
        self.mask = torch.ones(len(self.groups), dtype=torch.bool, device="cpu")
        self._warned = False
        self._join = JoinUnused(self._unused_parameters)
        self._model = unwrap(model)
        self._handles: list[RemovableHandle] = []
        if check_every:
            self._check_ranks()
        for hook in list(self._model._forward_hooks.values()):
            # the mask of an earlier run must not go on deciding what an attached optimizer leaves out
            if isinstance(earlier := getattr(hook, "__self__", None), CoTo):
                earlier.finish()
        for layer in self._layers.values():
            if isinstance(layer, PeftSwitch):
                continue
            # not layer.gate = …, which would fill a tensor that an earlier run left there
            on = torch.ones((), dtype=torch.int32, device="cpu") if gates == "device" else True
            layer._set_switch("_gate", on)
        if gates == "host":
            self._advise(model)
        self._go_to(0)

    def _advise(self, model: nn.Module) -> None:
        group_of = {
            id(module_of(self._layers[name])): i for i, names in enumerate(self.groups.values()) for name in names
        }
        for name, module in model.named_modules():
            if not hasattr(module, "_orig_mod") and getattr(module, "_compiled_call_impl", None) is None:
                continue
            inside = {group_of[id(child)] for child in module.modules() if id(child) in group_of}
            if len(inside) > 1:
                logger.warning(
                    "torch.compile traces a graph for every pattern of host gates inside a compiled module, until it "
                    "gives up; %s holds %d groups: compile modules of one group each, or take gates='device'",
                    name or "the model",
                    len(inside),
                )
                return

    def step(self) -> None:
        """Counts one optimizer step and draws the next mask. Call it after ``optimizer.step()``."""
        if not self._warned and not any(layer.training for layer in self._layers.values()):
            warnings.warn("CoTo.step() was called while no adapter is in training mode", stacklevel=2)
            self._warned = True
        self.set_step(self.current_step + 1)

    def set_step(self, step: int) -> None:
        """Applies the mask of optimizer step `step`, for loops that count themselves."""
        self._go_to(step)
        # calls and not steps, which is what may differ: ranks that disagree on when to check would wait for ever
        self._calls += 1
        if self._check_every and self._calls % self._check_every == 0:
            self._check_ranks()

    def _check_ranks(self) -> None:
        facts = {**self.state_dict(), "mask": self.mask.tolist(), "check_every": self._check_every}
        check_agreement("CoTo", facts)

    def _go_to(self, step: int) -> None:
        # a group whose adapters are all pruned or merged cannot be the one that is on
        available = [any(_trainable(self._layers[n]) for n in names) for names in self.groups.values()]
        mask = self.schedule.mask(len(self.groups), step, self.total_steps, available)
        self.current_step, self.p = int(step), self.schedule.probability(step, self.total_steps)
        self._apply(mask)
        peft = [layer for layer in self._layers.values() if isinstance(layer, PeftSwitch)]
        if not self._handles:
            self._handles = [self._model.register_forward_hook(self._join_unused)]
            if peft:
                # also where a forward raises. Here and not on each layer: torch.compile would trace a graph for each
                self._handles.append(self._model.register_forward_hook(self._restore, always_call=True))
        for layer in peft:
            layer.hold()  # each time: an earlier CoTo that finishes late lets go of it

    def _apply(self, mask: Tensor) -> None:
        self.mask = mask
        for names, on in zip(self.groups.values(), mask.tolist(), strict=True):
            for name in names:
                layer = self._layers[name]
                if layer.gate is not on:  # assigning an attribute of a module is slow, and most gates stay
                    layer.gate = on

    def finish(self) -> None:
        """Switches every adapter on and takes the hooks off: the end of the run, until another step is set."""
        self.p = 1.0
        self._apply(torch.ones_like(self.mask))
        while self._handles:
            self._handles.pop().remove()
        for layer in self._layers.values():
            if isinstance(layer, PeftSwitch):
                layer.release()

    def state_dict(self) -> dict[str, Any]:
        """The step and the settings; masks follow from them."""
        return {
            "step": self.current_step,
            "groups": [str(key) for key in self.groups],
            "total_steps": self.total_steps,
            **dataclasses.asdict(self.schedule),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, with its settings, and applies its step's mask.

        Raises:
            ValueError: `state` is not from a CoTo, or from one with other groups, or a setting is out of its
                range. Nothing is changed.
        """
        own = self.state_dict()
        if not isinstance(state, dict) or set(state) != set(own):
            got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state must be a CoTo state_dict with keys {sorted(own)}; got {got}")
        if state["groups"] != own["groups"]:
            raise ValueError(f"state must be of a model with the same groups, {own['groups']}; got {state['groups']}")
        before = self.total_steps, self.schedule
        schedule = Schedule(**{field.name: state[field.name] for field in dataclasses.fields(Schedule)})
        self.total_steps, self.schedule = integer("total_steps", state["total_steps"]), schedule
        try:
            self._go_to(state["step"])
        except BaseException:
            self.total_steps, self.schedule = before
            raise

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Makes `optimizer` leave the adapters that are off untouched; returns a handle that undoes this.

        Just before each of its steps, the gradients of adapters that are off become None. A
        single process with host gates and ``zero_grad(set_to_none=True)`` has none there anyway; DDP,
        device gates and zeroed gradients leave zeros, with which AdamW would still move and decay weights.

        The optimizer's state_dict holds zeros for adapters that have not been on yet, as
        torch.distributed.checkpoint needs it; loading one leaves them without a state, as they were.

        Args:
            optimizer: also one wrapped by accelerate or Lightning; may run backward in a closure.

        Raises:
            TypeError: `optimizer` is not a torch optimizer.
        """

        def forget() -> None:
            for parameter in self._idle(lambda layer, on: (layer.training and not on) or not _trainable(layer)):
                parameter.grad = None

        optimizer = unwrapped(optimizer)
        return Together(before_each_step(optimizer, forget), *keep_whole(optimizer))

    def _idle(self, off: Callable[[Switch, bool], bool]) -> list[nn.Parameter]:
        """Parameters of the adapters that are `off`, a function of a layer and its group's mask."""
        used: set[nn.Parameter] = set()
        idle: dict[nn.Parameter, None] = {}
        for names, on in zip(self.groups.values(), self.mask.tolist(), strict=True):
            for layer in (self._layers[name] for name in names):
                if off(layer, on):
                    idle |= dict.fromkeys(layer.adapter_parameters)
                else:
                    used.update(layer.adapter_parameters)
        # some of PEFT's methods share parameters among layers
        return [parameter for parameter in idle if parameter not in used]

    def _restore(self, module: nn.Module, args: Any, output: Any) -> None:
        """Leaves no layer of PEFT's switched by a forward that raised."""
        for layer in self._layers.values():
            if isinstance(layer, PeftSwitch):
                layer.restore()

    def _join_unused(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._join(output)

    def _unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that no forward uses now: of adapters that are off or merged."""
        return [p for p in self._idle(lambda layer, _: layer.active is False or layer.merged) if p.requires_grad]


def _trainable(layer: Switch) -> bool:
    enabled = layer.enabled if isinstance(layer, PeftSwitch) else is_enabled(layer)
    return not layer.merged and enabled
