"""The trainer of one task: transformers.Trainer with a loss that is the same mean however a batch is cut.

Each optimiser step minimises the mean cross-entropy over all targets of its batch: rows for classification, tokens
for the others. A batch cut into micro-batches or dealt out to processes gives the same gradient as a whole one.
transformers' models do not agree on that: those that ignore `num_items_in_batch` (BERT, T5) get a gradient that grows
with the number of micro-batches. So the loss is taken from the logits here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput

from loraforge.calibrate.base import no_bars, prefer_kwargs
from loraforge.errors import LoraforgeError
from loraforge.training.checkpoints import ended_state, mark_whole, named_when_refused, prune_checkpoints
from loraforge.training.loss import summed_cross_entropy, target_count, task_logits
from loraforge.training.saving import save_adapter

SHIFTED_KINDS = ("causal", "choice")
Scorer = Callable[[nn.Module], Mapping[str, float]]


class TaskTrainer(Trainer):
    """Trainer of one task.

    Args:
        model: PeftModel, or a transformers model for full fine-tuning.
        args: Of `training_arguments`.
        kind: Kind of the task.
        collate: Examples to a batch; its key `task` is dropped.
        train_rows: Examples of TaskData.
        eval_rows: The same, or None.
        score: Metrics of the model on the eval rows, main one included; None for the loss alone.
        callbacks: Further callbacks.
        keep: How many whole checkpoints stay, beside the best.
    """

    # The loss below is the mean over the whole batch already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        kind: str,
        collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]],
        train_rows: Sequence[dict[str, Tensor]],
        eval_rows: Sequence[dict[str, Tensor]] | None = None,
        score: Scorer | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        keep: int = 1,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: {key: value for key, value in collate(rows).items() if key != "task"},
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            callbacks=list(callbacks),
        )
        # It prints every log to stdout where progress bars are off.
        self.remove_callback(PrinterCallback)
        # Releases without loss_is_scaled_for_ga decide by this.
        self.model_accepts_loss_kwargs = True
        bare: Any = getattr(model, "get_base_model", lambda: model)()
        # Nothing is generated in training: a cache of keys and values would only take memory.
        self._options = prefer_kwargs(bare)
        self._score = score
        self._keep = keep
        encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._shifted = kind in SHIFTED_KINDS and not encoder_decoder
        self._prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None) if encoder_decoder else None
        # Step (from 1) of the first loss that was not finite; on the device, so that looking for it waits for nothing.
        self._bad_step = torch.zeros((), dtype=torch.int64, device=args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains, from a checkpoint on where one is given.

        What a run ended with is only read: transformers would make one more step from it where the last step is not the
        last of its epoch.
        """
        parted = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(resume_from_checkpoint, str) and not parted:
            state = ended_state(Path(resume_from_checkpoint))
            if state is not None:
                return self._take_up(resume_from_checkpoint, state)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _take_up(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """The end of a run out of its last checkpoint; what callbacks do before and after a training is done."""
        self._load_from_checkpoint(checkpoint)
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.state = state
        self.create_optimizer()
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.on_train_begin(self.args, state, self.control)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        self.callback_handler.on_train_end(self.args, state, self.control)
        return TrainOutput(state.global_step, float("nan"), {})

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and the number of targets in all of them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        total = sum(target_count(batch["labels"], shifted=self._shifted) for batch in batches)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.gather(torch.as_tensor(total, device=device)).sum()
        return batches, total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross-entropy over the targets of the whole batch (of `inputs` where no number is given)."""
        labels = inputs["labels"]
        logits = task_logits(model, inputs, self._prepare, self._options)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss = summed_cross_entropy(logits, labels, shifted=self._shifted, smoothing=smoothing)
        if num_items_in_batch is None:
            count = target_count(labels, shifted=self._shifted)
        else:
            # The engine averages gradients over the processes; the number counts the targets of all of them.
            count = torch.as_tensor(num_items_in_batch)
            loss = loss * self.accelerator.num_processes
        loss = loss / count.to(loss.device).clamp(min=1)
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-step; a loss that is not finite is remembered with its step."""
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step + 1
        bad = ~torch.isfinite(loss) & (self._bad_step == 0)
        self._bad_step = torch.where(bad, step, self._bad_step)
        if loss.device.type == "cpu":
            self.check_finite()
        return loss

    def check_finite(self) -> None:
        """Ends a run whose loss has left the numbers.

        Raises:
            LoraforgeError: Names the step.
        """
        step = int(self._bad_step)
        if step:
            raise LoraforgeError(
                "the loss is not finite",
                where=f"step {step} of {self.state.max_steps}",
                got="nan or inf",
                expected="a number",
                hint="a smaller --lr, warmup_steps, or max_grad_norm; with float16, bf16",
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, after a look at the loss."""
        self.check_finite()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The loss over the eval rows, with the scorer's metrics beside it; training goes on as if it had not been."""
        # A loader draws a seed when it starts, and the dropout of the next step would be another.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            scores = {} if self._score is None else self._score(self.model)
        if scores:
            output.metrics.update({f"{metric_key_prefix}_{name}": float(value) for name, value in scores.items()})
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights of a checkpoint; an adapter in the form that is the same bytes at every run."""
        if hasattr(self.model, "peft_config"):
            if self.args.should_save:
                save_adapter(self.model, Path(output_dir or self.args.output_dir), state_dict=state_dict)
        else:
            with no_bars():
                super()._save(output_dir, state_dict)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint, marked when it is whole; only then older ones go."""
        self.check_finite()
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        with named_when_refused(checkpoint, "the checkpoint"):
            super()._save_checkpoint(*args, **kwargs)
            self._save_more(checkpoint)
        # Every process writes its own random state there.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_whole(checkpoint)
            prune_checkpoints(folder, self._keep, self.state.best_model_checkpoint)

    def _save_more(self, checkpoint: Path) -> None:
        """What a subclass adds to a checkpoint before it is marked; called on all processes."""
