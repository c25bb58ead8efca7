from __future__ import annotations

import numpy as np
import pytest
import torch

from loraforge.linalg.spectrum import effective_rank, singular_values, stable_rank
from loraforge.types import LowRank
from tests.oracles import factored as oracle


@pytest.mark.parametrize(("m", "n", "r"), [(40, 30, 8), (3, 50, 8), (50, 3, 8), (1, 7, 1), (129, 97, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_singular_values_are_those_of_the_dense_delta(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(m)
    lr = LowRank(
        torch.randn(m, r, generator=generator).to(dtype), torch.randn(r, n, generator=generator).to(dtype), -0.5
    )
    found = singular_values(lr).numpy()
    exact = oracle.spectrum(oracle.dense_sum([(1.0, -0.5, lr.B.double().numpy(), lr.A.double().numpy())]))
    assert len(found) == min(m, n, r)
    assert np.allclose(found, exact[: len(found)], rtol=0, atol=1e-12 * exact[0])


def test_ranks_of_known_spectra() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7.0) and stable_rank(torch.ones(7)) == pytest.approx(7.0)
    one = torch.tensor([5.0, 0.0, 0.0])
    assert effective_rank(one) == pytest.approx(1.0) and stable_rank(one) == pytest.approx(1.0)
    S = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    assert stable_rank(S) == pytest.approx(21 / 16)
    assert effective_rank(S) == pytest.approx(oracle.effective_rank(S.numpy()))


def test_zero_and_empty_spectra() -> None:
    for S in (torch.zeros(3), torch.zeros(0)):
        assert effective_rank(S) == 0.0 and stable_rank(S) == 0.0
    assert singular_values(LowRank(torch.zeros(5, 2), torch.ones(2, 4))).tolist() == [0.0, 0.0]
