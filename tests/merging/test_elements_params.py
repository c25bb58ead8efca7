from __future__ import annotations

import subprocess
import sys

import pytest

from loraforge.errors import UsageError
from loraforge.merging.elements_params import BreadcrumbsParams, DareParams, DellaParams, TrimParams


@pytest.mark.parametrize("cls", [TrimParams, DareParams, DellaParams, BreadcrumbsParams])
@pytest.mark.parametrize("value", [-0.1, 1.5, True, "0.2", None, float("nan")])
def test_a_density_is_a_share(cls: type, value: object) -> None:
    with pytest.raises(UsageError, match="density") as caught:
        cls(density=value)
    assert caught.value.got == repr(value) and "0 <= density <= 1" in str(caught.value)


def test_choices_and_seeds() -> None:
    with pytest.raises(UsageError, match="global or module"):
        TrimParams(scope="all")
    with pytest.raises(UsageError, match="inverse or l1"):
        DellaParams(rescale="l2")
    for cls in (DareParams, DellaParams):
        assert cls(seed=-3).seed == -3
        with pytest.raises(UsageError, match="seed"):
            cls(seed=1.5)


def test_shares_that_do_not_fit_together() -> None:
    assert DellaParams(density=0.7, epsilon=0.3).epsilon == 0.3
    for density, epsilon in ((0.1, 0.2), (0.9, 0.2)):
        with pytest.raises(UsageError, match="epsilon=0.1"):
            DellaParams(density=density, epsilon=epsilon)
    assert BreadcrumbsParams(density=0.9, gamma=0.1).gamma == 0.1
    with pytest.raises(UsageError, match="gamma=0.05"):
        BreadcrumbsParams(density=0.95, gamma=0.1)


def test_does_not_import_torch() -> None:
    code = "import sys, loraforge.merging.elements_params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
