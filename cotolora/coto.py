"""The strategy: owns a run's schedule and sets the gates of a model's adapters."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cotolora.checks import integer, one_of, shown
from cotolora.groups import Unit, checked_unit, group_names, unwrap
from cotolora.schedule import NOT_GIVEN, Schedule, schedule_of
from cotolora.training.agreement import check_agreement
from cotolora.training.callers import AVERAGES, called_from
from cotolora.training.entry import EntryHooks, entries_below
from cotolora.training.notices import warn_of_disabled, warn_of_few_groups, warn_of_many_graphs, warn_of_stranger
from cotolora.training.optimizer_state import support_missing_states
from cotolora.training.reducer import OutputJoin, find_starved
from cotolora.training.stepping import CombinedHandle, register_before_step, unwrap_optimizer
from cotolora.training.switches import LayerSwitch, PeftSwitch, Switch, modules_by_users_name, parameters_of, switches
from cotolora.training.unreached import unwatch, warn_of_unreached, without_gradient

# which CoTo sets the gate of a layer. Weak and outside the layers, so that copies of a layer hold no CoTo
_COTO_OF: weakref.WeakKeyDictionary[nn.Module, weakref.ref[CoTo]] = weakref.WeakKeyDictionary()


def coto_of(layer: nn.Module) -> CoTo | None:
    """The CoTo that sets the gate of `layer`, if there is one."""
    found = _COTO_OF.get(layer)
    return None if found is None else found()


def checked_run(unit: object, gates: object, check_every: object) -> tuple[str, int]:
    """`gates` and `check_every` of a `CoTo`; raises as its constructor, also of `unit`, without a model."""
    checked_unit(unit)
    return one_of("gates", gates, ("host", "device")), integer("check_every", check_every, 0)


class CoTo:
    r"""Progressive activation of adapters: at optimizer step t each group is on with probability p(t).

    p rises from `initial_p` to 1 over the first `ramp` of the run (see `activation_probability`), so the
    run ends as ordinary LoRA. Masks are a pure function of the seed and the step (see `sample_mask`), so they are
    the same on every rank and after every resume, whatever else draws random numbers.

    The constructor applies step 0. Gates change only in `step`, `set_step`, `load_state_dict` and `finish`. Call these
    where a learning rate scheduler is stepped, so that no gate changes between a forward and its backward:

        coto = CoTo(model, total_steps=len(loader) * epochs)
        coto.attach(optimizer)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            coto.step()

    In `eval()` every adapter is on, whatever the gates are; so it is in a moving average of the model (AveragedModel,
    timm's ModelEmaV3) always, also where ``update_bn`` runs it in training mode. An adapter has one CoTo: one that is
    constructed, or set to a step, finishes any other that has an adapter of its own, through whatever module each was
    constructed.

    A PEFT model works as well, with any of PEFT's methods whose layers can be disabled one by one (LoRA, DoRA, HiRA,
    LoHa, OFT, …). Its masks are those that our own layers in the same places would have. CoTo switches the layers
    that have an active adapter when it is constructed.

    Args:
        model: a model with adapters, ours or PEFT's; may be wrapped by DistributedDataParallel or torch.compile.
        total_steps: optimizer steps of the run.
        schedule: when groups are on. Its fields may also be given one by one, instead:
        initial_p, ramp, shape, tilt, at_least_one, seed: see `Schedule`, where their defaults are.
        unit: what is switched together: "layer" (adapters whose names agree up to the integer that counts the repeated
            blocks, such as ``model.layers.3``: see `group_names`), "module" (each adapter) or a callable from name to
            key, for models made of stages of blocks, say.
        gates: "host" (bools; an adapter that is off launches nothing and costs nothing) or "device" (int32
            tensors written in place, for CUDA graphs and whole-model compile; these are buffers, so a moving average,
            which pairs the buffers of two models, must be made after this).
        check_every: in a distributed run, compare seed, step, settings, groups and mask of all ranks in the
            constructor and in every n-th call of `step` or `set_step`; 0 is never. This is a small all-gather, so
            every rank must make these calls, with the same `check_every`. If one does not, the others wait for it
            until the timeout of the default process group. Not part of the state.

    Attributes:
        groups: adapter names by group, in module order.
        mask: bool ``[len(groups)]`` on the CPU, which groups are on now.
        p: the schedule's probability now.
        current_step: optimizer steps done.
        schedule: the `Schedule`.
        total_steps: optimizer steps of the run.

    Raises:
        TypeError: `model` is not a module, or `unit` neither a string nor a callable.
        ValueError: the model has no adapters, merged ones or some of PEFT's that must not be switched (PiSSA: off would
            mean a residual, not the pretrained weight), or an argument is out of its range.
        RuntimeError: from the constructor, `step` and `set_step`, on every rank: `check_every` found that ranks
            differ. The message names the ranks, what differs, and the values on this rank.

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
        if merged := [name for name, switch in self._layers.items() if switch.merged]:
            raise ValueError(f"model must have no merged adapters, which cannot train; merged: {merged}")
        gates, check_every = checked_run(unit, gates, check_every)
        if gates == "device" and any(isinstance(switch, PeftSwitch) for switch in self._layers.values()):
            raise ValueError("gates must be 'host' on a PEFT model, whose switch is a bool of the host; got 'device'")
        self.groups: dict[Hashable, list[str]] = group_names(self._layers, unit, modules_by_users_name(model))
        self.schedule = schedule_of(
            schedule, initial_p=initial_p, ramp=ramp, shape=shape, tilt=tilt, at_least_one=at_least_one, seed=seed
        )
        self.total_steps = integer("total_steps", total_steps)
        self._check_every, self._calls = check_every, 0
        self.current_step, self.p = 0, 0.0
        # on the CPU by name: the user may have set another default device
        self.mask = torch.ones(len(self.groups), dtype=torch.bool, device="cpu")
        self._optimizers: list[torch.optim.Optimizer] = []  # those that are attached
        # one parameter of each of them that may have no gradient at all in this step
        self._starved: list[nn.Parameter] = []
        self._join = OutputJoin(self._parameters_by_use, self._is_masked, self._is_attached, self._starved_now)
        modules = modules_by_users_name(model)
        blocks = group_names(self._layers, "layer", modules)
        parts = entries_below(modules, {name: key for key, names in blocks.items() for name in names})
        self._model = unwrap(model)
        self._entries = EntryHooks(self._model, parts, self._after_forward)
        self._active = False
        self._warned = False
        self._unreached: set[str] = set()
        if check_every:
            self._check_ranks()
        self._take_over()
        for switch in self._layers.values():
            if isinstance(switch, LayerSwitch):
                switch.reset_gate(gates)
        warn_of_few_groups(self.groups)
        # of PEFT's layers, its own switch is looked at in every forward
        ours = {name: switch for name, switch in self._layers.items() if isinstance(switch, LayerSwitch)}
        warn_of_disabled([name for name, switch in ours.items() if not switch.enabled], len(ours))
        if gates == "host":
            warn_of_many_graphs(model, [[switch.layer for switch in group] for group in self._switches()])
        self._go_to(0)

    def step(self) -> None:
        """Counts one optimizer step and draws the next mask. Call it after ``optimizer.step()``."""
        if not self._warned and not any(switch.training for switch in self._layers.values()):
            warnings.warn("CoTo.step() was called while no adapter is in training mode", stacklevel=2)
            self._warned = True
        self.set_step(self.current_step + 1)

    def set_step(self, step: int) -> None:
        """Applies the mask of optimizer step `step`, for loops that count themselves."""
        self._go_to(step)
        # counts calls and not steps: where steps differ, ranks would check at different times and wait for ever
        self._calls += 1
        if self._check_every and self._calls % self._check_every == 0:
            self._check_ranks()

    def finish(self) -> None:
        """Switches every adapter on and takes the hooks off: the end of the run, until another step is set.

        Adapters that another CoTo has taken over are left to it.
        """
        self.p, self.mask = 1.0, torch.ones_like(self.mask)
        self._entries.remove()
        self._active = False
        for switch in self._layers.values():
            if coto_of(switch.layer) is self:
                switch.set_gate(True)
                switch.remove()
                del _COTO_OF[switch.layer]

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Makes `optimizer` leave the adapters that are off untouched; returns a handle that undoes this.

        Just before each of its steps, the gradients of adapters that are off become None. A
        single process with host gates and ``zero_grad(set_to_none=True)`` has none there anyway; DDP,
        device gates and zeroed gradients leave zeros, with which AdamW would still move and decay weights.

        An adapter that has not been on yet has no optimizer state. A state_dict may be loaded before or after this. For
        torch.distributed.checkpoint, which needs states of all parameters, it holds stand-ins of NaN, which are removed
        on loading, or by this if they are loaded before.

        Args:
            optimizer: also one wrapped by accelerate or Lightning; may run backward in a closure.

        Raises:
            TypeError: `optimizer` is not a torch optimizer, or LBFGS, which steps all parameters together, or SGD with
                momentum and fused=True, which takes no parameter whose first step comes after those of others.
        """
        optimizer = unwrap_optimizer(optimizer)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer must step each parameter by its own gradient; got LBFGS, whose direction is one of all "
                "parameters and moves adapters that are off"
            )
        if isinstance(optimizer, torch.optim.SGD) and any(g["fused"] and g["momentum"] for g in optimizer.param_groups):
            raise TypeError(
                "optimizer must take parameters that have their first step after others; got fused SGD with momentum, "
                "which raises then (use it with fused=False)"
            )
        warn_of_stranger(optimizer, (p for p in self._model.parameters() if p.requires_grad))
        unwatch(switch.layer for switch in self._layers.values())  # seen below, by the mask
        before = register_before_step(optimizer, functools.partial(self._before_optimizer_step, optimizer))
        self._optimizers.append(optimizer)
        self._find_starved()
        return CombinedHandle(
            before, *support_missing_states(optimizer), then=functools.partial(self._detach, optimizer)
        )

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
            raise ValueError(f"state must be a CoTo state_dict with keys {sorted(own)}; got {shown(state)}")
        if not isinstance(state["groups"], list) or state["groups"] != own["groups"]:
            raise ValueError(
                f"state must be of a model with the same groups, {own['groups']}; got {shown(state['groups'])}"
            )
        before = self.total_steps, self.schedule
        schedule = Schedule(**{field.name: state[field.name] for field in dataclasses.fields(Schedule)})
        self.total_steps, self.schedule = integer("total_steps", state["total_steps"]), schedule
        try:
            self._go_to(state["step"])
        except BaseException:
            self.total_steps, self.schedule = before
            raise

    def _switches(self) -> list[list[Switch]]:
        """The switches of each group."""
        return [[self._layers[name] for name in names] for names in self.groups.values()]

    def _go_to(self, step: int) -> None:
        # a group whose adapters are all disabled or merged cannot be the one that is on
        available = [any(switch.trainable for switch in group) for group in self._switches()]
        mask = self.schedule.mask(len(self.groups), step, self.total_steps, available)
        self.current_step, self.p = int(step), self.schedule.probability(step, self.total_steps)
        self._take_over()
        self.mask = mask
        for group, on in zip(self._switches(), mask.tolist(), strict=True):
            for switch in group:
                switch.set_gate(on)
        # on the model, its parts and its blocks, and not on each layer, whose calls would take longer
        self._entries.install()
        self._active = True
        for switch in self._layers.values():
            switch.install()
        self._find_starved()

    def _take_over(self) -> None:
        """Makes this the CoTo of its layers. The mask of an earlier one no longer decides what an optimizer steps."""
        others = {coto for switch in self._layers.values() if (coto := coto_of(switch.layer)) not in (None, self)}
        for other in others:
            other.finish()
        for switch in self._layers.values():
            _COTO_OF[switch.layer] = weakref.ref(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizers": [], "_starved": []}  # hooks of an optimizer are not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copy of a model holds a copy of its CoTo, in its hooks
        self.__dict__.update(state)
        if self._active:
            for switch in self._layers.values():
                _COTO_OF[switch.layer] = weakref.ref(self)
        if called_from(*AVERAGES):  # our own layers see to this themselves
            for switch in self._layers.values():
                if isinstance(switch, PeftSwitch):
                    switch.set_gate(True)

    def _check_ranks(self) -> None:
        facts = {**self.state_dict(), "mask": self.mask.tolist(), "check_every": self._check_every}
        check_agreement("CoTo", facts)

    def _after_forward(self, output: Any) -> Any:
        for switch in self._layers.values():
            switch.restore()  # where a forward raised
        return self._join(output)

    def _parameters_by_use(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The trainable parameters that a forward leaves out of the graph now, and the others."""
        unused: list[Switch] = []
        used: list[Switch] = []
        for switch in self._layers.values():
            (unused if switch.unused else used).append(switch)
        off, on = parameters_of(unused, used), parameters_of(used, ())
        return [p for p in off if p.requires_grad], [p for p in on if p.requires_grad]

    def _is_masked(self) -> bool:
        return any(switch.masked for switch in self._layers.values())

    def _is_attached(self) -> bool:
        return bool(self._optimizers)

    def _starved_now(self) -> list[nn.Parameter]:
        return self._starved

    def _detach(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizers.remove(optimizer)
        self._find_starved()

    def _find_starved(self) -> None:
        # once a step and not in each forward, where it would take longer than the hooks
        self._starved = find_starved(self._optimizers, self._parameters_by_use()[0]) if self._optimizers else []

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        off: list[Switch] = []
        on: list[Switch] = []
        for group, is_on in zip(self._switches(), self.mask.tolist(), strict=True):
            for switch in group:
                # by the mask and not by the gate, which may be a tensor on a device
                trains = switch.trainable and (is_on or not switch.training)
                (on if trains else off).append(switch)
        if unreached := without_gradient(on, optimizer):
            # of those that another CoTo has taken over, that one knows which are on
            own = [switch for switch in unreached if coto_of(switch.layer) in (None, self)]
            names = [name for name, switch in self._layers.items() if switch in own]
            warn_of_unreached([name for name in names if name not in self._unreached])
            self._unreached.update(names)
        # no other optimizer's, or GradScaler would find nothing there when it comes to that one
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in held.intersection(parameters_of(off, on)):
            parameter.grad = None
