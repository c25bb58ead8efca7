"""Charts are tested with their reports; drawn twenty times they would take half of these tests' time."""

from __future__ import annotations

import pytest

from loraforge.report import evaluation, training


@pytest.fixture(autouse=True)
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (training, evaluation):
        monkeypatch.setattr(module, "svg", lambda draw, label: "")
