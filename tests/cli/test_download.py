from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from loraforge import pipelines

from .conftest import only_object

Run = Callable[..., Result]
ITEM: dict[str, Any] = {
    "name": "owner/model", "kind": "model", "state": "fetched", "place": "cache/model", "files": 3, "bytes": 2048,
    "licence": "apache-2.0", "from": None, "note": None, "size": "about 1 GB",
}  # fmt: skip
OWN = ITEM | {
    "name": "rows.jsonl", "kind": "file", "state": "by hand", "place": None, "bytes": None, "licence": None,
    "from": "https://example.org", "note": "ask first", "size": "6 GB",
}  # fmt: skip
FOUND: dict[str, Any] = {"name": "GLUE_t5", "data": ".", "items": [ITEM, OWN], "bytes": 2048}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def download(source: str, *, tell: Any, progress: Any, **options: Any) -> dict[str, Any]:
        seen.append({"source": source, **options})
        tell("owner/model: 1 MB, licence: apache-2.0")
        return FOUND

    monkeypatch.setattr(pipelines, "download", download)
    return seen


def test_people_read_what_was_fetched_and_what_is_theirs_to_bring(run: Run, calls: list[dict[str, Any]]) -> None:
    result = run("download", "GLUE_t5", "--data", "rows", "--base", "b", "--set", "rows=3")
    assert result.exit_code == 0, result.stderr
    assert calls == [{"source": "GLUE_t5", "data": "rows", "settings": {"base": "b", "rows": 3}, "dry_run": False}]
    assert "licence: apache-2.0" in result.stderr  # said before it is fetched
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["owner/model", "fetched", "2.0", "KiB", "apache-2.0", "cache/model"] in lines
    assert "by hand: rows.jsonl (from https://example.org, 6 GB, ask first)" in result.stdout
    assert "fetched 2.0 KiB" in result.stdout


def test_json_is_what_the_download_returns(run: Run, calls: list[dict[str, Any]]) -> None:
    assert only_object(run("download", "GLUE_t5", "--json")) == FOUND


def test_a_dry_run_fetches_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real function, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run("download", "EMOTION_t5_large", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "google/flan-t5-large" in result.stdout and "about 3.1 GB" in result.stdout
    assert "only tec/test.json is published" in result.stdout and "nothing was fetched" in result.stdout
    assert list(tmp_path.iterdir()) == []
    offline = run("download", "EMOTION_t5_large")
    assert offline.exit_code == 3 and "cannot be reached" in offline.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines, "download", interrupted)
    result = run("download", "GLUE_t5")
    assert result.exit_code == 130 and "the same command goes on" in result.stderr
