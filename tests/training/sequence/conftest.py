from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.tiny import tiny_base

TASKS, ROWS = 3, 10
KEYS = [f"k{i}" for i in range(TASKS * ROWS)]
VALUES = [f"v{i}" for i in range(10)]
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer decoder that knows the keys and values."""
    return tiny_base(tmp_path_factory.mktemp("llama"), "llama", vocab_words=[*KEYS, *VALUES, "is"], hidden=32, layers=2)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("bert"), "bert", vocab_words=[*KEYS, *VALUES])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves the pictures out, which take longer than these runs."""
    monkeypatch.setattr("loraforge.training.sequence.evaluate.write_reports", lambda run: None)
    yield


def recall(seed: int, tasks: int = TASKS, rows: int = ROWS) -> list[dict[str, Any]]:
    """Tasks whose rows are keys with a value each: nothing but memory tells them."""
    rng = random.Random(seed)
    found = []
    for t in range(tasks):
        pairs = [{"text": f"{key} is", "target": rng.choice(VALUES)} for key in KEYS[rows * t : rows * (t + 1)]]
        found.append({"id": "abc"[t], "train": pairs, "test": pairs})
    return found


def short(base: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A sequence of two tasks and six steps each, with dropout and more rows than the buffer holds."""
    content: dict[str, Any] = {
        "base_model": str(base),
        "output_dir": str(out),
        "lora": {"r": 2, "dropout": 0.2, "targets": TARGETS},
        "ilora": {"ilora_buffer_size": 12, "ema_alpha": 0.1},
        "train": {
            "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "save_steps": 2,
            "logging_steps": 1,
        },
        "eval": {"max_new_tokens": 1},
        "tasks": recall(0, tasks=2),
    }  # fmt: skip
    return content | {k: {**content[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
