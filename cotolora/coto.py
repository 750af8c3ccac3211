"""`CoTo`: draws a mask at each optimizer step and sets the gates of a model's adapters by it."""

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
from cotolora.training.reducer import OutputJoin, find_grad_carriers
from cotolora.training.stepping import CombinedHandle, register_before_step, unwrap_optimizer
from cotolora.training.switches import LayerSwitch, PeftSwitch, Switch, modules_by_users_name, parameters_of, switches
from cotolora.training.unreached import unwatch, warn_of_unreached, without_gradient

# the CoTo that sets the gate of each layer. Weak references outside the layers, so that a copied layer holds no CoTo
_COTO_OF: weakref.WeakKeyDictionary[nn.Module, weakref.ref[CoTo]] = weakref.WeakKeyDictionary()


def coto_of(layer: nn.Module) -> CoTo | None:
    """The CoTo that sets the gate of `layer`, or None."""
    found = _COTO_OF.get(layer)
    return None if found is None else found()


def checked_run(unit: object, gates: object, check_every: object) -> tuple[str, int]:
    """Checks `unit`, `gates` and `check_every` as the constructor of `CoTo` does, and returns the last two."""
    checked_unit(unit)
    return one_of("gates", gates, ("host", "device")), integer("check_every", check_every, 0)


class CoTo:
    r"""Progressive activation of adapters: at optimizer step t each group is active with probability p(t).

    p rises from `initial_p` to 1 over the first fraction `ramp` of the run (see `activation_probability`), so the
    run ends as ordinary LoRA. Masks are a pure function of the seed and the step (see `sample_mask`), so they are
    the same on every rank and after every resume, and do not depend on any global random state.

    The constructor applies step 0. Gates change only in `step`, `set_step`, `load_state_dict` and `finish`. Call these
    where a learning rate scheduler is stepped, so that no gate changes between a forward and its backward:

        coto = CoTo(model, total_steps=len(loader) * epochs)
        coto.attach(optimizer)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            coto.step()

    In `eval()` every adapter is active, whatever the gates are. In a moving average of the model (AveragedModel, timm's
    ModelEmaV3) every adapter is always active, even if ``update_bn`` runs the average in training mode. An adapter
    belongs to one CoTo: constructing a CoTo, or setting its step, finishes every other CoTo that has an adapter in
    common with it, even if the two were given different modules of the model.

    A PEFT model works as well, with any of PEFT's methods whose layers can be disabled one by one (LoRA, DoRA, HiRA,
    LoHa, OFT, …). It gets the same masks as this library's layers in the same places. CoTo switches the layers
    that have an active adapter when it is constructed.

    Args:
        model: a model with adapters, ours or PEFT's; may be wrapped by DistributedDataParallel or torch.compile.
        total_steps: number of optimizer steps of the run.
        schedule: the activation schedule. Instead of it, its fields may be given one by one:
        initial_p, ramp, shape, tilt, at_least_one, seed: see `Schedule`, which has their defaults.
        unit: which adapters are switched together: "layer" (those of one repeated block, such as ``model.layers.3``:
            see `group_names`), "module" (each adapter by itself) or a callable from an adapter's name to the key of its
            group, for example in models that consist of stages of blocks.
        gates: "host" (bools; an inactive adapter launches no kernels) or "device" (int32 tensors written in place, for
            CUDA graphs and whole-model compile). Device gates are buffers, so a moving average, which pairs the buffers
            of two models, must be created after this.
        check_every: in a distributed run, compare seed, step, settings, groups and mask of all ranks in the
            constructor and in every n-th call of `step` or `set_step`; 0 disables this. It is a small all-gather, so
            every rank must make these calls, with the same `check_every`. If one does not, the others wait for it
            until the timeout of the default process group. Not part of the state_dict.

    Attributes:
        groups: adapter names by group, in module order.
        mask: bool ``[len(groups)]`` on the CPU, which groups are active now.
        p: the activation probability now.
        current_step: number of optimizer steps done.
        schedule: the `Schedule`.
        total_steps: number of optimizer steps of the run.

    Raises:
        TypeError: `model` is not a module, or `unit` is neither a string nor a callable.
        ValueError: the model has no adapters, has merged ones or has PEFT adapters that must not be switched (PiSSA:
            without the adapter the layer has a residual, not the pretrained weight), or an argument is out of its
            range.
        RuntimeError: from the constructor, `step` and `set_step`, on every rank: `check_every` found that ranks
            differ. The message lists the ranks, what differs, and the values on this rank.

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
            raise ValueError("gates must be 'host' on a PEFT model, whose layers are switched by a bool; got 'device'")
        self.groups: dict[Hashable, list[str]] = group_names(self._layers, unit, modules_by_users_name(model))
        self.schedule = schedule_of(
            schedule, initial_p=initial_p, ramp=ramp, shape=shape, tilt=tilt, at_least_one=at_least_one, seed=seed
        )
        self.total_steps = integer("total_steps", total_steps)
        self._check_every, self._calls = check_every, 0
        self.current_step, self.p = 0, 0.0
        # explicitly on the CPU: the user may have set another default device
        self.mask = torch.ones(len(self.groups), dtype=torch.bool, device="cpu")
        self._optimizers: list[torch.optim.Optimizer] = []  # the attached ones
        # an unused parameter of each attached optimizer that might otherwise have no gradient in this step
        self._grad_carriers: list[nn.Parameter] = []
        self._join = OutputJoin(self._parameters_by_use, self._is_masked, self._is_attached, self._grad_carriers_now)
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
        # not of PEFT's layers, whose own switch is read in every forward
        ours = {name: switch for name, switch in self._layers.items() if isinstance(switch, LayerSwitch)}
        warn_of_disabled([name for name, switch in ours.items() if not switch.enabled], len(ours))
        if gates == "host":
            warn_of_many_graphs(model, [[switch.layer for switch in group] for group in self._switches()])
        self._go_to(0)

    def __repr__(self) -> str:
        on = f"{int(self.mask.sum())} of {len(self.groups)} groups active"
        return f"CoTo(step {self.current_step} of {self.total_steps}, p={self.p:.3g}, {on})"

    def step(self) -> None:
        """Counts one optimizer step and draws the next mask. Call it after ``optimizer.step()``."""
        if not self._warned and not any(switch.training for switch in self._layers.values()):
            warnings.warn("CoTo.step() was called while no adapter is in training mode", stacklevel=2)
            self._warned = True
        self.set_step(self.current_step + 1)

    def set_step(self, step: int) -> None:
        """Applies the mask of optimizer step `step`, for loops that count the steps themselves.

        Raises:
            ValueError: `step` is not an integer of at least 0.
            RuntimeError: ranks differ, see `check_every`.
        """
        self._go_to(step)
        # counts calls, not steps: if steps differed, ranks would check at different times and deadlock
        self._calls += 1
        if self._check_every and self._calls % self._check_every == 0:
            self._check_ranks()

    def finish(self) -> None:
        """Ends the run: activates every adapter and removes the hooks, until another step is set.

        Adapters that another CoTo has taken over are not changed.
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
        """Makes `optimizer` skip inactive adapters; returns a handle that undoes this.

        Just before each optimizer step, the gradients of inactive adapters are set to None. In a
        single process with host gates and ``zero_grad(set_to_none=True)`` they already are; DDP,
        device gates and zeroed gradients leave zeros, with which AdamW would still move and decay weights.

        An adapter that has never been active has no optimizer state. An optimizer state_dict may be loaded before or
        after this call. torch.distributed.checkpoint needs states of all parameters, so a state_dict made for it holds
        NaN placeholders. They are removed on loading, or by this call if they were loaded before it.

        Args:
            optimizer: may be wrapped by accelerate or Lightning, and may run backward in a closure.

        Raises:
            TypeError: `optimizer` is not a torch optimizer; or it is LBFGS, which steps all parameters together, or SGD
                with momentum and fused=True, which cannot step a parameter for the first time later than others.
        """
        optimizer = unwrap_optimizer(optimizer)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer must step each parameter by its own gradient; got LBFGS, which computes one direction for "
                "all parameters and would move inactive adapters"
            )
        if isinstance(optimizer, torch.optim.SGD) and any(g["fused"] and g["momentum"] for g in optimizer.param_groups):
            raise TypeError(
                "optimizer must accept parameters that have their first step later than others; got SGD with momentum "
                "and fused=True, which raises then (use fused=False)"
            )
        warn_of_stranger(optimizer, (p for p in self._model.parameters() if p.requires_grad))
        unwatch(switch.layer for switch in self._layers.values())  # _before_optimizer_step watches them, by the mask
        before = register_before_step(optimizer, functools.partial(self._before_optimizer_step, optimizer))
        self._optimizers.append(optimizer)
        self._find_grad_carriers()
        return CombinedHandle(
            before, *support_missing_states(optimizer), then=functools.partial(self._detach, optimizer)
        )

    def state_dict(self) -> dict[str, Any]:
        """The step and the settings, which determine the masks."""
        return {
            "step": self.current_step,
            "groups": [str(key) for key in self.groups],
            "total_steps": self.total_steps,
            **dataclasses.asdict(self.schedule),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the step and the settings of `state` and applies the mask of that step.

        Raises:
            ValueError: `state` is not from a CoTo, is from one with other groups, or holds a setting that is out
                of its range. Nothing is changed then.
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
        # a group whose adapters are all disabled or merged must not count as the one active group
        available = [any(switch.trainable for switch in group) for group in self._switches()]
        mask = self.schedule.mask(len(self.groups), step, self.total_steps, available)
        self.current_step, self.p = int(step), self.schedule.probability(step, self.total_steps)
        self._take_over()
        self.mask = mask
        for group, on in zip(self._switches(), mask.tolist(), strict=True):
            for switch in group:
                switch.set_gate(on)
        # on the model, its parts and its blocks; hooks on every layer would take longer
        self._entries.install()
        self._active = True
        for switch in self._layers.values():
            switch.install()
        self._find_grad_carriers()

    def _take_over(self) -> None:
        """Makes this the CoTo of its layers; the mask of an earlier one no longer affects what an optimizer steps."""
        others = {coto for switch in self._layers.values() if (coto := coto_of(switch.layer)) not in (None, self)}
        for other in others:
            other.finish()
        for switch in self._layers.values():
            _COTO_OF[switch.layer] = weakref.ref(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizers": [], "_grad_carriers": []}  # a copy has no hooks on the optimizers

    def __setstate__(self, state: dict[str, Any]) -> None:
        # the hooks of a copied model hold a copy of its CoTo
        self.__dict__.update(state)
        if self._active:
            for switch in self._layers.values():
                _COTO_OF[switch.layer] = weakref.ref(self)
        if called_from(*AVERAGES):  # CoToLoRALinear.__setstate__ does this for our own layers
            for switch in self._layers.values():
                if isinstance(switch, PeftSwitch):
                    switch.set_gate(True)

    def _check_ranks(self) -> None:
        facts = {**self.state_dict(), "mask": self.mask.tolist(), "check_every": self._check_every}
        check_agreement("CoTo", facts)

    def _after_forward(self, output: Any) -> Any:
        for switch in self._layers.values():
            switch.restore()  # after a forward that raised
        return self._join(output)

    def _parameters_by_use(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The trainable adapter parameters that a forward now leaves out of the graph, and the others."""
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

    def _grad_carriers_now(self) -> list[nn.Parameter]:
        return self._grad_carriers

    def _detach(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizers.remove(optimizer)
        self._find_grad_carriers()

    def _find_grad_carriers(self) -> None:
        # once per step: in each forward it would take longer than the hooks
        self._grad_carriers = (
            find_grad_carriers(self._optimizers, self._parameters_by_use()[0]) if self._optimizers else []
        )

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        off: list[Switch] = []
        on: list[Switch] = []
        for group, is_on in zip(self._switches(), self.mask.tolist(), strict=True):
            for switch in group:
                # reads the mask instead of the gate, which may be a tensor on a device
                trains = switch.trainable and (is_on or not switch.training)
                (on if trains else off).append(switch)
        if unreached := without_gradient(on, optimizer):
            # adapters that another CoTo has taken over are left out: that CoTo knows which of them are active
            own = [switch for switch in unreached if coto_of(switch.layer) in (None, self)]
            names = [name for name, switch in self._layers.items() if switch in own]
            warn_of_unreached([name for name in names if name not in self._unreached])
            self._unreached.update(names)
        # only parameters of this optimizer: GradScaler would find no gradients left for another one
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for parameter in held.intersection(parameters_of(off, on)):
            parameter.grad = None
