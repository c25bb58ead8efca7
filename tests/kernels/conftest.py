"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
import torch

from loraforge.kernels import backend

SIZES = (1, 7, 97, 129)


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once on each form of the operators; the compiled one is skipped where it is not built."""
    if request.param == "native" and not backend.native_available():
        pytest.skip("loraforge._C is not built")
    monkeypatch.setenv(backend.VARIABLE, request.param)
    return request.param


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Demands the compiled form."""
    if not backend.native_available():
        pytest.skip("loraforge._C is not built")
    monkeypatch.setenv(backend.VARIABLE, "native")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20240)


@pytest.fixture
def threads():
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
