"""CoTo in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cotolora.checks import flag
from cotolora.coto import CoTo, checked_run
from cotolora.groups import Unit, adapters
from cotolora.saving.adapter import save_adapter
from cotolora.schedule import NOT_GIVEN, Schedule, schedule_of


class CoToCallback(TrainerCallback):
    """Runs CoTo on a model with adapters, ours or PEFT's: ``Trainer(model, args, ..., callbacks=[CoToCallback()])``.

    The mask of an optimizer step is a function of ``state.global_step``, so a resumed run has the masks of one that was
    not interrupted, and all micro-batches of a step have one mask. Adapters that are off keep their weights and their
    optimizer state. In evaluation and in saved files all adapters are on, and after training they stay on.

    Args:
        schedule, initial_p, ramp, shape, unit, tilt, at_least_one, seed, gates, check_every: see `CoTo`.
            Its total_steps are ``state.max_steps``.
        save: also write our adapters in PEFT's format into the folder ``adapter`` of every checkpoint. A PEFT model
            is saved by Trainer itself.

    Attributes:
        coto: the `CoTo` of the current or the last run, None before the first.

    Raises:
        ValueError: an argument is out of its range; when training begins, also whatever `CoTo` raises.
    """

    def __init__(
        self,
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
        save: bool = True,
    ) -> None:
        schedule = schedule_of(
            schedule,
            initial_p=initial_p,
            ramp=ramp,
            shape=shape,
            tilt=tilt,
            at_least_one=at_least_one,
            seed=seed,
        )
        gates, check_every = checked_run(unit, gates, check_every)
        self._settings: dict[str, Any] = {
            "schedule": schedule,
            "unit": unit,
            "gates": gates,
            "check_every": check_every,
        }
        self._save = flag("save", save)
        self._attached: RemovableHandle | None = None
        self.coto: CoTo | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **_: Any,
    ) -> None:
        """Constructs the CoTo, now that the number of steps is known."""
        self._detach()  # left over from a run that an exception ended
        self.coto = CoTo(model, state.max_steps, **self._settings)
        self._attached = self.coto.attach(optimizer)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Applies the mask of the optimizer step that begins, including the first one after a resume."""
        assert self.coto is not None
        self.coto.set_step(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Writes our adapters beside what Trainer has written."""
        if self._save and adapters(model):
            assert args.output_dir is not None
            # in a folder of its own: adapter files in the checkpoint itself Trainer would load with PEFT
            save_adapter(model, Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Switches every adapter on."""
        assert self.coto is not None
        self.coto.finish()
        self._detach()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None
