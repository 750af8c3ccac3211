"""CoTo in Lightning."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch.utils.hooks import RemovableHandle

from cotolora.coto import CoTo, checked_run
from cotolora.groups import Unit
from cotolora.schedule import NOT_GIVEN, Schedule, schedule_of


class CoToLightningCallback(Callback):
    """Runs CoTo on a LightningModule that holds adapters, ours or PEFT's: ``callbacks=[CoToLightningCallback()]``.

    The mask of an optimizer step is a function of ``trainer.global_step``, so a resumed run has the masks of one that
    was not interrupted, and all micro-batches of a step have one mask. Adapters that are off keep their weights and
    their optimizer state. In validation all adapters are on, and after training they stay on. With several optimizers,
    global_step counts the steps of all of them, and so does the schedule.

    Args:
        schedule, initial_p, ramp, shape, unit, tilt, at_least_one, seed, gates, check_every: see `CoTo`.
            Its total_steps are those of the trainer's max_epochs and max_steps, accumulation as it is or as a
            GradientAccumulationScheduler changes it; they must be finite.

    Attributes:
        coto: the `CoTo` of the current or the last run, None before the first.

    Raises:
        ValueError: an argument is out of its range; when training begins, also whatever `CoTo` raises, or the run
            has no end, or `gates` is "device" and another callback is a WeightAveraging.
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
        self._attached: list[RemovableHandle] = []
        self.coto: CoTo | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Constructs the CoTo, now that the number of steps is known."""
        self._detach()  # left over from a run that an exception ended
        if self._settings["gates"] == "device" and any(isinstance(c, _weight_averaging()) for c in trainer.callbacks):
            raise ValueError(
                "gates must be 'host' beside a WeightAveraging callback, which has copied the module already and pairs "
                "its buffers with those of the copy; got 'device', whose gates would be more of them"
            )
        self.coto = CoTo(pl_module, _steps_of(trainer), **self._settings)
        # on every rank, whatever step it resumes from: check_every counts calls
        self.coto.set_step(trainer.global_step)
        self._attached = [self.coto.attach(optimizer) for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Applies the mask of the optimizer step that begins; the batches of one step share it."""
        assert self.coto is not None
        if self.coto.current_step != trainer.global_step:
            self.coto.set_step(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switches every adapter on."""
        assert self.coto is not None
        self.coto.finish()
        self._detach()

    def _detach(self) -> None:
        while self._attached:
            self._attached.pop().remove()


def _weight_averaging() -> type | tuple[()]:
    # Lightning has it from 2.6 on
    return getattr(callbacks, "WeightAveraging", ())


def _steps_of(trainer: Trainer) -> int:
    """Optimizer steps of the run, those before a resume included.

    Raises:
        ValueError: the run has no end.
    """
    steps, batches, epochs = trainer.estimated_stepping_batches, trainer.num_training_batches, trainer.max_epochs
    if not isinstance(steps, int) or steps < 0:  # -1, of max_steps, where the loader has no length
        raise ValueError(
            "the trainer must have max_steps or max_epochs, the latter with a loader that has a length, for CoTo to "
            f"know the end of the run; got max_steps={trainer.max_steps}, max_epochs={epochs} and {batches} batches "
            "an epoch"
        )
    if isinstance(batches, int) and epochs is not None and epochs > 0:
        # the estimate knows of no callback that changes the run
        bounds, accumulated = [0], lambda _: trainer.accumulate_grad_batches
        for callback in trainer.callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                bounds, accumulated = callback.epochs, callback.get_accumulate_grad_batches
            elif isinstance(callback, StochasticWeightAveraging):
                epochs = min(epochs, callback.swa_end + 1)  # one more is for batch norm alone, and steps nothing
        bounds = [*(epoch for epoch in bounds if epoch < epochs), epochs]
        steps = sum((end - start) * math.ceil(batches / accumulated(start)) for start, end in pairwise(bounds))
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return steps
