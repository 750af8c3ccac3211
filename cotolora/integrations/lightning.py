"""CoTo for Lightning."""

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

    The mask of an optimizer step is a function of ``trainer.global_step``, so a resumed run has the same masks as an
    uninterrupted one, and all micro-batches of a step have the same mask. Inactive adapters keep their weights and
    their optimizer state. In validation and after training all adapters are active. With several optimizers,
    global_step counts the steps of all of them, and so does the schedule.

    Args:
        schedule, initial_p, ramp, shape, unit, tilt, at_least_one, seed, gates, check_every: see `CoTo`. Its
            total_steps follow from the trainer's max_epochs and max_steps and from gradient accumulation, including a
            GradientAccumulationScheduler; they must be finite.

    Attributes:
        coto: the `CoTo` of the current or the last run, None before the first.

    Raises:
        TypeError: `schedule` is neither a Schedule nor None, or `unit` is neither a string nor a callable.
        ValueError: an argument is out of its range. When training begins: whatever `CoTo` raises; or the run
            has no end; or `gates` is "device" and another callback is a WeightAveraging.
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
        """Constructs the CoTo, since the number of steps is now known."""
        self._detach()  # hooks may be left from a run that ended with an exception
        if self._settings["gates"] == "device" and any(isinstance(c, _weight_averaging()) for c in trainer.callbacks):
            raise ValueError(
                "gates must be 'host' with a WeightAveraging callback, which has already copied the module and pairs "
                "its buffers with those of the copy; got 'device', which would add buffers"
            )
        self.coto = CoTo(pl_module, _steps_of(trainer), **self._settings)
        # unconditionally, so that every rank calls it: check_every counts calls
        self.coto.set_step(trainer.global_step)
        self._attached = [self.coto.attach(optimizer) for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Applies the mask of the optimizer step that begins; all batches of one step share it."""
        assert self.coto is not None
        if self.coto.current_step != trainer.global_step:
            self.coto.set_step(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Activates every adapter."""
        assert self.coto is not None
        self.coto.finish()
        self._detach()

    def _detach(self) -> None:
        while self._attached:
            self._attached.pop().remove()


def _weight_averaging() -> type | tuple[()]:
    # exists since Lightning 2.6
    return getattr(callbacks, "WeightAveraging", ())


def _steps_of(trainer: Trainer) -> int:
    """The number of optimizer steps of the run, including those before a resume.

    Raises:
        ValueError: the run has no end.
    """
    steps, batches, epochs = trainer.estimated_stepping_batches, trainer.num_training_batches, trainer.max_epochs
    if not isinstance(steps, int) or steps < 0:  # max_steps is -1 and the loader has no length
        raise ValueError(
            "the trainer must have max_steps, or max_epochs and a loader with a length, so that CoTo knows the end of "
            f"the run; got max_steps={trainer.max_steps}, max_epochs={epochs} and {batches} batches per epoch"
        )
    if isinstance(batches, int) and epochs is not None and epochs > 0:
        # the estimate ignores callbacks that change the run
        bounds, accumulated = [0], lambda _: trainer.accumulate_grad_batches
        for callback in trainer.callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                bounds, accumulated = callback.epochs, callback.get_accumulate_grad_batches
            elif isinstance(callback, StochasticWeightAveraging):
                epochs = min(epochs, callback.swa_end + 1)  # a further epoch only updates batch norm, without steps
        bounds = [*(epoch for epoch in bounds if epoch < epochs), epochs]
        steps = sum((end - start) * math.ceil(batches / accumulated(start)) for start, end in pairwise(bounds))
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return steps
