"""CoTo for transformers' Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from cotolora.checks import flag
from cotolora.coto import CoTo, checked_run
from cotolora.groups import Unit, adapters, plain_name
from cotolora.saving.adapter import save_adapter
from cotolora.schedule import NOT_GIVEN, Schedule, schedule_of

logger = logging.getLogger("cotolora")


class CoToCallback(TrainerCallback):
    """Runs CoTo on a model with adapters, ours or PEFT's: ``Trainer(model, args, ..., callbacks=[CoToCallback()])``.

    The mask of an optimizer step is a function of ``state.global_step``, so a resumed run has the same masks as an
    uninterrupted one, and all micro-batches of a step have the same mask. Inactive adapters keep their weights and
    their optimizer state. In evaluation, in saved files and after training all adapters are active.

    Args:
        schedule, initial_p, ramp, shape, unit, tilt, at_least_one, seed, gates, check_every: see `CoTo`.
            Its total_steps are ``state.max_steps``.
        save: also write our adapters in PEFT's format into the folder ``adapter`` of every checkpoint. A PEFT model
            is saved by Trainer itself.
        save_base: keep the whole model in a checkpoint, as Trainer writes it. False removes the frozen parameters
            from its ``model.safetensors``: a run can then be resumed, and its best model loaded, in a Trainer whose
            model has the same base, but `from_pretrained` cannot read such a checkpoint.

    Attributes:
        coto: the `CoTo` of the current or the last run, None before the first.

    Raises:
        TypeError: `schedule` is neither a Schedule nor None, or `unit` is neither a string nor a callable.
        ValueError: an argument is out of its range. When training begins: whatever `CoTo` raises.
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
        save_base: bool = True,
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
        self._save, self._save_base = flag("save", save), flag("save_base", save_base)
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
        """Constructs the CoTo, since the number of steps is now known."""
        self._detach()  # hooks may be left from a run that ended with an exception
        self.coto = CoTo(model, state.max_steps, **self._settings)
        self._attached = self.coto.attach(optimizer)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Applies the mask of the optimizer step that begins, including the first one after a resume."""
        assert self.coto is not None
        self.coto.set_step(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Writes our adapters into the checkpoint, and removes the base from it if `save_base` is False."""
        assert args.output_dir is not None
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._save and adapters(model):
            # in a separate folder: Trainer would load adapter files in the checkpoint itself with PEFT
            save_adapter(model, checkpoint / "adapter")
        if not self._save_base and args.should_save and adapters(model):
            leave_out_base(checkpoint, model)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Activates every adapter."""
        assert self.coto is not None
        self.coto.finish()
        self._detach()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


def leave_out_base(checkpoint: Path, model: nn.Module) -> None:
    """Removes the frozen parameters of `model` from the weights in a checkpoint folder, which may be several files."""
    files = sorted(checkpoint.glob("model*.safetensors"))
    if not files:
        logger.warning("save_base=False found no model.safetensors in %s and did not change it", checkpoint)
        return
    frozen = {plain_name(name) for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    kept: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            kept |= {key: opened.get_tensor(key) for key in opened.keys() if plain_name(key) not in frozen}  # noqa: SIM118
    whole = checkpoint / SAFE_WEIGHTS_NAME
    part = whole.with_suffix(".part")
    save_file(kept, part, metadata={"format": "pt"})
    part.replace(whole)
    for file in (*files, checkpoint / SAFE_WEIGHTS_INDEX_NAME):
        if file != whole:
            file.unlink(missing_ok=True)
