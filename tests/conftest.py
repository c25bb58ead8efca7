"""Shared fixtures: nothing here touches a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DATA = Path(os.environ.get("LORAFORGE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where PyTorch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles the emulated kernels on another core while the tests before theirs run."""
    if sum("_emulated" in item.nodeid for item in session.items) > 50 and not session.config.option.collectonly:
        root = Path(__file__).resolve().parent.parent
        command = ["nice", sys.executable, "-m", "tests.kernels.emulator"]
        if shutil.which("nice") is not None:
            builder = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            session.config.add_cleanup(lambda: (builder.terminate(), builder.wait()))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real adapters, models and text; tests that need them are skipped where they are absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}; set LORAFORGE_DATA to run this test")
    return DATA
