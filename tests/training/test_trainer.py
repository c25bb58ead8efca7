from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraforge.errors import LoraforgeError
from loraforge.tasks import Collator, load_model, load_task, pad_token_id_of, parse_task
from loraforge.training.arguments import training_arguments
from loraforge.training.checkpoints import WHOLE, drop_torn, prune_checkpoints, whole_checkpoints
from loraforge.training.loss import summed_cross_entropy, target_count
from loraforge.training.snapshots import EarlyStop
from loraforge.training.trainer import TaskTrainer
from tests.tasks.tiny import tiny_base, write_rows

ANSWERS = [
    {"text": "good red", "target": "up sun"}, {"text": "bad", "target": "down"},
    {"text": "fine blue one", "target": "up"}, {"text": "poor two", "target": "down moon cat"},
]  # fmt: skip


def trainer_of(base: Path, rows: Path, kind: str, out: Path, train: dict[str, Any], **more: Any) -> TaskTrainer:
    data = load_task(parse_task({"id": "t", "train": str(rows), "kind": kind}, "test"), "train", base=base)
    model, config, _ = load_model(base, kind, head_labels=data.labels, trainable=True)
    args = training_arguments({"learning_rate": 0.01, **train}, out)
    return TaskTrainer(
        more.pop("model", model),
        args,
        kind=kind,
        collate=Collator(kind, pad_token_id_of(None, config)),
        train_rows=data.examples,
        eval_rows=data.examples if "eval_strategy" in train else None,
        **more,
    )


def test_summed_cross_entropy_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]]))
    labels = torch.tensor([[0, -100]])
    assert summed_cross_entropy(logits, labels, shifted=False).item() == pytest.approx(0.693147, abs=1e-6)
    assert summed_cross_entropy(logits, torch.tensor([[2, 1]]), shifted=True).item() == pytest.approx(
        1.386294, abs=1e-6
    )
    assert target_count(torch.tensor([[1, -100, 2]]), shifted=False).item() == 2
    assert target_count(torch.tensor([[1, -100, 2]]), shifted=True).item() == 1


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_loss_is_that_of_the_model_for_a_single_batch(tmp_path: Path, family: str) -> None:
    kind = {"bert": "classification", "t5": "text-to-text", "llama": "causal"}[family]
    rows = ANSWERS if kind != "classification" else [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}]
    base, file = tiny_base(tmp_path / family, family), write_rows(tmp_path / "r.jsonl", rows)
    trainer = trainer_of(base, file, kind, tmp_path / "o", {})
    batch = trainer.data_collator(list(trainer.train_dataset))  # type: ignore[call-overload, arg-type]
    model = trainer.model.eval()
    with torch.no_grad():
        own = trainer.compute_loss(model, dict(batch))
        assert own.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize(("family", "kind"), [("bert", "classification"), ("t5", "text-to-text"), ("llama", "causal")])
def test_a_cut_batch_gives_the_gradient_of_a_whole_one(tmp_path: Path, family: str, kind: str) -> None:
    # Rows of unequal length: means of micro-batches would weigh their tokens unequally.
    rows = ANSWERS if kind != "classification" else [{"text": f"{w} sun", "label": w} for w in ("good", "bad")] * 2
    base, file = tiny_base(tmp_path / family, family), write_rows(tmp_path / "r.jsonl", rows)
    weights, losses = [], []
    for size, pieces in ((4, 1), (2, 2)):
        # Plain gradient steps without clipping: Adam would hide a gradient that is a multiple of the right one.
        train = {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces, "max_steps": 2,
                 "optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.5}  # fmt: skip
        trainer = trainer_of(base, file, kind, tmp_path / f"o{pieces}", train)
        losses.append(trainer.train().training_loss)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(weights[1], weights[0], atol=2e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


class Broken(nn.Module):
    """Two weights whose loss leaves the numbers at the third step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        self.calls += 1
        logits = self.weight[None].expand(input_ids.shape[0], -1)
        return type("Output", (), {"logits": logits * (float("nan") if self.calls == 3 else 1.0)})


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    train = {"per_device_train_batch_size": 4, "max_steps": 4}
    trainer = trainer_of(bert, rows_file, "classification", tmp_path, train, model=Broken())
    with pytest.raises(LoraforgeError, match="the loss is not finite") as raised:
        trainer.train()
    assert raised.value.where == "step 3 of 4"
    assert not list(tmp_path.glob("checkpoint-*"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond so many bytes a file, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [2000, 40_000], ids=["weights", "optimiser"])
def test_a_disk_that_refuses_a_checkpoint_is_named(bert: Path, rows_file: Path, tmp_path: Path, size: int) -> None:
    train = {"per_device_train_batch_size": 8, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(bert, rows_file, "classification", tmp_path, train)
    with largest_file(size), pytest.raises(LoraforgeError, match="checkpoint could not be written") as raised:
        trainer.train()
    assert raised.value.where == str(tmp_path / "checkpoint-1")
    assert "--resume" in str(raised.value.hint)
    assert whole_checkpoints(tmp_path) == []


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for step in (2, 10, 9, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 30:
            (tmp_path / f"checkpoint-{step}" / WHOLE).touch()
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    prune_checkpoints(tmp_path, 1, best=str(tmp_path / "checkpoint-2"))
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    drop_torn(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_evaluation_does_not_change_what_is_learnt(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "bert", dropout=0.3)
    file = write_rows(tmp_path / "r.jsonl", [{"text": f"{w} sun", "label": w} for w in ("good", "bad")] * 4)
    found = []
    for name, values in (("without", {}), ("with", {"eval_strategy": "steps", "eval_steps": 1})):
        train = {"per_device_train_batch_size": 2, "max_steps": 3, **values}
        trainer = trainer_of(base, file, "classification", tmp_path / name, train, score=lambda model: {"s": 1.0})
        trainer.train()
        assert sum("eval_s" in entry for entry in trainer.state.log_history) == (3 if values else 0)
        found.append(trainer.model.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize(("strategy", "steps", "seen"), [("steps", 3, 3), ("epoch", -1, 4)])
def test_the_end_of_a_run_is_only_read_again(tmp_path: Path, strategy: str, steps: int, seen: int) -> None:
    base = tiny_base(tmp_path / "base", "bert")
    file = write_rows(tmp_path / "r.jsonl", [{"text": f"{w} sun", "label": w} for w in ("good", "bad")] * 4)
    train = {"per_device_train_batch_size": 4, "max_steps": steps, "num_train_epochs": 9, "save_strategy": strategy,
             "save_steps": 1, "eval_strategy": strategy, "eval_steps": 1, "load_best_model_at_end": True,
             "metric_for_best_model": "s", "greater_is_better": True}  # fmt: skip
    found = []
    for checkpoint in (None, str(tmp_path / "o" / f"checkpoint-{seen}")):
        scores = iter([0.3, 0.2, 0.1])  # the first is the best
        stop = [EarlyStop("eval_s", 1, True)] if strategy == "epoch" else []
        trainer = trainer_of(
            base, file, "classification", tmp_path / "o", train, score=lambda model, s=scores: {"s": next(s)},
            callbacks=stop, keep=5,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        assert (trainer.state.global_step, trainer.state.best_global_step) == (seen, 1 if strategy == "steps" else 2)
        found.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
