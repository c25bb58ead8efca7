"""Importance and gate gradients on a GPU: the numbers of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraforge.measure.importance.gradients import gate_gradients
from loraforge.measure.importance.measure import measure_importance
from loraforge.measure.subjects.objectives import make_objective
from tests.measure.deep_subjects import deep

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:the head .* has random weights")]
# Of the losses, which are near 1: float32 sums in another order, and differences of such losses.
CLOSE = 1e-4


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("tokens_per_pass", [1, None], ids=["a head a pass", "default"])
def test_importance(family: str, tokens_per_pass: int | None, tmp_path: Path) -> None:
    here = measure_importance(deep(tmp_path, family), tokens_per_pass=1)
    there = measure_importance(deep(tmp_path, family, device="cuda"), tokens_per_pass=tokens_per_pass)
    assert [line["I"] for line in there] == pytest.approx([line["I"] for line in here], abs=CLOSE)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_gradients(family: str, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        subject = deep(tmp_path, family, device=device)
        found.append(gate_gradients(subject, make_objective("task", subject, warn=False)).s)
    assert found[1] == pytest.approx(found[0], abs=CLOSE)
