"""Which positions count as a head's output."""

from __future__ import annotations

from pathlib import Path

import torch

from loraforge.measure.importance.ablation import real_tokens
from loraforge.measure.subjects.subject import open_subject
from loraforge.tasks import TaskSpec
from tests.measure.deep_subjects import LABELS, texts
from tests.tasks.tiny import tiny_base


def test_padding_of_a_classifier_of_two_stacks_is_no_token(tmp_path: Path) -> None:
    """Both stacks read the row itself: its labels say nothing of which positions of the decoder are padding."""
    base = tiny_base(tmp_path / "bart", "bart")
    spec = TaskSpec("t", test=texts(), kind="classification", labels=LABELS)
    subject = open_subject(base, task=spec, device="cpu", batch_size=7)
    (batch,) = subject.batches()
    mask = batch.inputs["attention_mask"].bool()
    assert not mask.all()
    for attention in subject.layout.attentions:
        x = torch.zeros(*mask.shape, attention.n_q * attention.o.size)
        assert torch.equal(real_tokens(subject, batch, attention, x), mask)
