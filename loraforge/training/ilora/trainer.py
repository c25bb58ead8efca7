"""The trainer of one task of a sequence: replay, consistency with the stable adapter, moving average.

    with replay      L = (CE(current) + CE(replayed)) / 2 + consistency_weight l_cons
    without          L =  CE(current)

A micro-step draws from the buffer, runs the plastic adapter on the current and the replayed rows, the stable one
without gradient on the replayed rows, and only then offers the current rows. The plastic adapter is active again before
the backward pass, which under checkpointing runs the model anew. An optimiser step ends with one step of the average.

CE(current) is the mean over the targets of the whole batch, as in `TaskTrainer`: where nothing is replayed, training is
the plain one to the bit. CE(replayed) and l_cons are means over a micro-batch, averaged over those of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback

from loraforge.errors import LoraforgeError, UsageError, raise_problems
from loraforge.training import ranks
from loraforge.training.ilora.adapters import pair_adapters
from loraforge.training.ilora.batches import WASTE, Batch, has_targets, joined, rows_of, wasted
from loraforge.training.ilora.buffer import ReplayBuffer
from loraforge.training.ilora.checkpoint import load, save_buffer, save_more
from loraforge.training.ilora.config import ILoraConfig
from loraforge.training.ilora.consistency import LabelMask
from loraforge.training.ilora.ema import EmaPairs
from loraforge.training.ilora.figures import Figures
from loraforge.training.ilora.hidden import accepted, probe
from loraforge.training.ilora.stable import Stable
from loraforge.training.ilora.steps import Steps
from loraforge.training.loss import summed_cross_entropy, target_count
from loraforge.training.trainer import Scorer, TaskTrainer

TASK = "task"
# Rules that look at the loss of every token.
_NEEDS = {"token": "labels"}


@dataclass(frozen=True)
class Replay:
    """What a micro-step replays.

    Attributes:
        batch: The rows, padded, on the device.
        tasks: (R,) numbers of their tasks.
        fused: Whether they share a forward with the current rows.
    """

    batch: Batch
    tasks: Tensor
    fused: bool


class ILoraTrainer(TaskTrainer):
    """Trainer of one task of a sequence.

    Args:
        model: With the adapter `default`; and `ema` (`adapters.add_stable`) unless the config keeps none.
        args: Of `training_arguments`.
        kind: Kind of the task.
        collate: Examples to a batch, their key `task` with it.
        train_rows: Examples of TaskData.
        ilora: The parameters. With `use_ilora` off this is `TaskTrainer`, and all other keywords are without effect
            but `label_ids`.
        buffer: Rows of earlier tasks; a new one by default. With several processes: the whole one, or this process's.
        task_index: Number of this task, where rows have no key `task`.
        label_ids: Positions in the head of every task's labels; the loss of a row is over those of its task alone.
        eval_rows: As `train_rows`, or None.
        score: As in `TaskTrainer`.
        callbacks: Further callbacks.
        keep: How many whole checkpoints stay, beside the best.

    Attributes:
        buffer: This process's part of the buffer.
        pairs: The two adapters' tensors and their average; None without a stable adapter.

    Raises:
        LoraforgeError: A layer that the model does not have, adapters that do not pair, an engine that parts the
            weights, or parameters that do not go with the task.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        *,
        kind: str,
        collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]],
        train_rows: Sequence[dict[str, Tensor]],
        ilora: ILoraConfig,
        buffer: ReplayBuffer | None = None,
        task_index: int = 0,
        label_ids: Mapping[int, Sequence[int]] | None = None,
        eval_rows: Sequence[dict[str, Tensor]] | None = None,
        score: Scorer | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        keep: int = 1,
    ) -> None:
        super().__init__(
            model, args, kind=kind, collate=collate, train_rows=train_rows, eval_rows=eval_rows, score=score,
            callbacks=callbacks, keep=keep,
        )  # fmt: skip
        self.data_collator = collate
        self.ilora, self.kind, self.task_index = ilora, kind, task_index
        self._labels = _label_mask(model, label_ids)
        self._check()
        self.pairs: EmaPairs | None = None
        if ilora.keeps_stable:
            self.pairs = EmaPairs(pair_adapters(model), getattr(torch, ilora.ema_dtype))
        self.buffer = self._own(buffer)
        self._stable = self._stable_of(train_rows[0]) if ilora.pulls else None
        self._options = accepted(model, use_cache=False)
        self._figures = Figures(args.device)
        self.add_callback(Steps(self))

    def _check(self) -> None:
        """What a run is checked for before its first step."""
        problems: list[LoraforgeError] = []
        if self.ilora.use_ilora and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            problems.append(
                LoraforgeError("I-LORA does not run under FSDP or DeepSpeed, which part the weights", where="launcher",
                               expected="DDP: torchrun, or accelerate without these")
            )  # fmt: skip
        if self._labels is not None and self.args.label_smoothing_factor:
            problems.append(
                LoraforgeError("label smoothing would reach labels of other tasks", where="label_smoothing_factor",
                               got=self.args.label_smoothing_factor, expected="0, with labels of several tasks")
            )  # fmt: skip
        if self.ilora.pulls and self.ilora.consistency_mask == "labels" and self.kind in ("classification", "images"):
            problems.append(
                UsageError("a task of this kind has no answer tokens", where="consistency_mask", got="labels",
                           expected="attention")
            )  # fmt: skip
        raise_problems(problems)

    def _own(self, buffer: ReplayBuffer | None) -> ReplayBuffer:
        """This process's part of a buffer."""
        world, rank = self.args.world_size, self.args.process_index
        if buffer is None:
            ilora = self.ilora
            capacity = ilora.ilora_buffer_size if ilora.replays else 0
            buffer = ReplayBuffer(capacity, seed=self.args.seed, policy=ilora.buffer_policy, dedup=ilora.buffer_dedup)
        return buffer if buffer.world == world else buffer.shard(rank, world)

    def _stable_of(self, row: dict[str, Tensor]) -> Stable:
        """The stable forward, once a row has shown how this model is asked for hidden states."""
        config = self.ilora
        batch = {key: value.to(self.args.device) for key, value in self.data_collator([row]).items() if key != TASK}
        states = probe(self.model, self._given(batch), config.hidden_state_layers)
        if "pixel_values" in batch and self._shifted and "labels" in (config.consistency_mask, _NEEDS.get(config.rule)):
            raise UsageError(
                "hidden states of this model are those of the image, not of the answer's tokens",
                where="selective_rule, consistency_mask",
                got=f"{config.rule}, {config.consistency_mask}",
                expected="another rule than token, and the mask attention",
            )
        return Stable(self.model, config, self.kind, self._shifted, self._given, states, self._labels)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss above in training; the cross-entropy alone in evaluation, which leaves the buffer as it is."""
        inputs = dict(inputs)
        tasks = inputs.pop(TASK, None)
        if tasks is None:
            tasks = torch.full_like(inputs["labels"].reshape(len(inputs["labels"]), -1)[:, 0], self.task_index)
        replays = model.training and self.ilora.replays
        replay = self._draw(inputs) if replays else None
        if replay is not None:
            loss, logits = self._replayed(model, inputs, tasks, replay, num_items_in_batch)
        else:
            logits = self._forward(model, inputs, **self._options).logits
            loss = self._current(logits, inputs["labels"], tasks, num_items_in_batch, model.training)
        if replays:
            self.buffer.offer(rows_of(inputs, self._shifted), tasks.tolist())
        return (loss, {"logits": logits}) if return_outputs else loss

    def _draw(self, current: Batch) -> Replay | None:
        """Rows to replay, None if any process has none: all of them take the same way through the model."""
        ilora = self.ilora
        if self.state.global_step % ilora.replay_every:
            return None
        size = ilora.replay_batch_size or len(current["labels"])
        rows = self.buffer.draw(size, self.task_index if ilora.replay_scope == "past" else None)
        usable = any(has_targets(row, self._shifted) for row in rows)
        batch, tasks, fused = {}, torch.empty(0), False
        if usable:
            batch = {key: self._placed(value) for key, value in self.data_collator(rows).items()}
            tasks = batch.pop(TASK)
            fused = ilora.fused_forward == "always" or (
                ilora.fused_forward == "auto" and wasted(current, batch) < WASTE
            )
        way = ranks.least(usable + (usable and fused), self.args.device)
        if way == 0:
            return None
        self._figures.replayed([int(row[TASK]) for row in rows])
        return Replay(batch, tasks, way == 2)

    def _placed(self, value: Tensor) -> Tensor:
        if self.args.device.type != "cuda":
            return value
        return value.pin_memory().to(self.args.device, non_blocking=True)

    def _given(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model's forward takes for a batch: all but its labels."""
        given: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
        if self._prepare is not None:
            given["decoder_input_ids"] = self._prepare(labels=batch["labels"])
        return given

    def _forward(self, model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Any:
        return model(**self._given(batch), **options)

    def _summed(self, logits: Tensor, labels: Tensor, tasks: Tensor, training: bool = True) -> Tensor:
        if self._labels is not None:
            logits = self._labels(logits, tasks)
        smoothing = self.args.label_smoothing_factor if training else 0.0
        return summed_cross_entropy(logits, labels, shifted=self._shifted, smoothing=smoothing)

    def _current(
        self, logits: Tensor, labels: Tensor, tasks: Tensor, num_items: Tensor | int | None, training: bool = True
    ) -> Tensor:
        """CE(current), normalised as in `TaskTrainer`."""
        summed, own = self._summed(logits, labels, tasks, training), target_count(labels, shifted=self._shifted)
        if training:
            self._figures.add("ce_current", summed, own)
        if num_items is None:
            return summed / own.to(summed.device).clamp(min=1)
        return summed * self.accelerator.num_processes / torch.as_tensor(num_items).to(summed.device).clamp(min=1)

    def _replayed(
        self, model: nn.Module, inputs: Batch, tasks: Tensor, replay: Replay, num_items: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        """The loss with replay, and the logits of the current rows."""
        rows, stable = len(inputs["labels"]), self._stable
        options = self._options | (stable.options if stable else {})
        if replay.fused:
            both = joined(inputs, replay.batch)
            outputs = self._forward(model, both, **options)
            logits, old_logits = outputs.logits[:rows], outputs.logits[rows:]
            labels, old_labels, first = both["labels"][:rows], both["labels"][rows:], rows
        else:
            logits, labels = self._forward(model, inputs, **self._options).logits, inputs["labels"]
            outputs = self._forward(model, replay.batch, **options)
            old_logits, old_labels, first = outputs.logits, replay.batch["labels"], 0
        summed = self._summed(old_logits, old_labels, replay.tasks)
        count = target_count(old_labels, shifted=self._shifted)
        self._figures.add("ce_replay", summed, count)
        micro_steps = self.current_gradient_accumulation_steps
        loss = (self._current(logits, labels, tasks, num_items) + summed / count.clamp(min=1) / micro_steps) / 2
        if stable:
            plastic = [state[first:] for state in stable.states.of(outputs)]
            value, kept = stable.consistency(plastic, old_logits, replay.batch, replay.tasks)
            self._figures.add("l_cons", value, 1)
            self._figures.add("kept_fraction", kept, 1)
            loss = loss + (self.ilora.consistency_weight / micro_steps * value).to(loss.dtype)
        return loss, logits

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Logs, the parts of the loss with it."""
        if self.ilora.use_ilora and "loss" in logs:
            drift = {} if self.pairs is None else {"ema_drift": self.pairs.drift()}
            logs = logs | self._figures.taken(len(self.buffer)) | drift
        super().log(logs, *args, **kwargs)

    def save_buffer(self, path: str | Path) -> None:
        """Writes the parts of all processes to one file; every process calls it, one writes."""
        save_buffer(self.buffer, Path(path), writes=self.args.should_save)

    def _save_more(self, checkpoint: Path) -> None:
        save_more(self, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load(self, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Everything of the best checkpoint, not its active adapter alone."""
        load(self, Path(str(self.state.best_model_checkpoint)))


def _label_mask(model: Any, label_ids: Mapping[int, Sequence[int]] | None) -> LabelMask | None:
    """None where every task has all labels of the head."""
    if not label_ids:
        return None
    mask = LabelMask(label_ids, int(model.config.num_labels))
    return mask if mask.acts else None
