"""One test body for two machines: a pretended GPU everywhere, and the real one where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.device.machine import pretend_gpu
from tests.device.pretend import Pretend
from tests.merging.scenarios import Maker

REAL = torch.cuda.is_available()


@pytest.fixture
def pretended() -> Iterator[Pretend]:
    """A machine with a GPU that is not there."""
    if REAL:
        pytest.skip("this machine has a GPU: the same tests run on it")
    with pretend_gpu() as gpu:
        yield gpu


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Pretend | None:
    """The pretended GPU, or None for the real one."""
    if request.param == "pretended":
        found: Pretend = request.getfixturevalue("pretended")
        return found
    if not REAL:
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    return None


@pytest.fixture(scope="package")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("adapters"))
