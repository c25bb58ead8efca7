from __future__ import annotations

from pathlib import Path

import pytest

from tests.tasks.tiny import tiny_base, write_rows

ROWS = [
    {"text": f"{word} {other}", "label": label}
    for word, label in (("good", "up"), ("fine", "up"), ("bad", "down"), ("poor", "down"))
    for other in ("red", "blue", "sun", "moon")
]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("bert") / "base", "bert", dropout=0.1)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)
