"""Hooks of the training loop: the average after a step, what processes tell each other before an epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from loraforge.training import ranks
from loraforge.training.ilora.ema import effective_weight

if TYPE_CHECKING:
    from loraforge.training.ilora.trainer import ILoraTrainer


class Steps(TrainerCallback):
    """Hooks of one trainer."""

    def __init__(self, trainer: ILoraTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Refuses an optimiser that does not hold exactly the plastic adapter.

        Raises:
            RuntimeError: It does not.
        """
        if self._trainer.pairs is None:
            return
        held = {id(p) for group in self._trainer.optimizer.param_groups for p in group["params"]}
        wanted = {id(pair.plastic) for pair in self._trainer.pairs.pairs}
        if held != wanted:
            raise RuntimeError(f"the optimiser holds {len(held)} tensors, the plastic adapter has {len(wanted)}")

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Rows are dealt out anew: no process takes up what another one was offered."""
        buffer = self._trainer.buffer
        # A run that goes on within an epoch begins it a second time.
        within = (self._trainer.state.epoch or 0.0) % 1.0
        if buffer.dedup and buffer.world > 1 and not within:
            buffer.exchange(set().union(*ranks.gather(buffer.fresh)))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One step of the average, if it is due and the optimiser made one: a skipped step has nothing new."""
        trainer, config = self._trainer, self._trainer.ilora
        step = trainer.state.global_step
        if trainer.pairs is None or step % config.ema_every or trainer.accelerator.optimizer_step_was_skipped:
            return
        trainer.pairs.update(effective_weight(config, step))
