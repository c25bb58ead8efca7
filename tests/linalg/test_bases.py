from __future__ import annotations

import pytest
import torch

from loraforge.linalg import bases
from loraforge.linalg.bases import GRAM_LOSS, Side, gram_sides, pivoted_side
from tests.linalg.test_factored import draw

F64 = torch.float64


def columns(seed: int, rows: int = 80, R: int = 8) -> torch.Tensor:
    return torch.randn(rows, R, generator=torch.Generator().manual_seed(seed), dtype=F64)


def assert_basis(side: Side, X: torch.Tensor, rank: list[int], slack: float) -> None:
    for at, p in enumerate(rank):
        Q = side.basis()[at]
        size = (Q.T @ Q).diagonal()
        # Directions that were left out are zeros: p columns are orthonormal and the others nothing.
        assert int((size > 0.5).sum()) == p or side.solve is None
        kept = Q[:, size > 0.5]
        assert (kept.T @ kept - torch.eye(kept.shape[1], dtype=F64)).abs().max() < slack
        assert ((Q @ side.triangle[at] - X[at]).norm(dim=0) <= slack * X[at].norm(dim=0).clamp_min(1.0)).all()


@pytest.mark.parametrize("loss", GRAM_LOSS.values())
def test_every_module_of_a_batch_gets_the_form_it_needs(loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, equal columns, two passes, QR: each within its bound."""
    plain, equal, near, nearer = (columns(seed) for seed in range(4))
    equal[:, 4:] = equal[:, :4] * 0.5
    fine = loss == GRAM_LOSS[torch.float32]
    near[:, 4:] = near[:, :4] + (1e-5 if fine else 1e-3) * columns(7)[:, :4]
    nearer[:, 4:] = nearer[:, :4] + 1e-6 * columns(8)[:, :4]
    X = torch.stack([plain, equal, near, nearer])
    by_qr, by_second = [], []
    plain_qr, plain_second = torch.linalg.qr, bases._second_pass

    def qr(part):
        by_qr.append(next(i for i in range(4) if torch.equal(part, X[i])))
        return plain_qr(part)

    def second(part, triangle, solve):
        by_second.extend(i for one in part for i in range(4) if torch.equal(one, X[i]))
        return plain_second(part, triangle, solve)

    monkeypatch.setattr(torch.linalg, "qr", qr)
    monkeypatch.setattr(bases, "_second_pass", second)
    side = pivoted_side(X, loss)
    # Of float64 columns equal ones might differ by 1e-9: only QR tells.
    assert by_qr == ([] if fine else [1, 3]) and by_second == ([2, 3] if fine else [2])
    assert_basis(side, X, [8, 4 if fine else 8, 8, 8], 1e-7 if fine else 1e-10)


def test_one_form_for_all_leaves_the_columns_alone() -> None:
    X = torch.stack([columns(1), columns(2)])
    side = pivoted_side(X, GRAM_LOSS[F64])
    assert side.matrix is X
    assert_basis(side, X, [8, 8], 1e-12)


def test_zero_columns_stay_in_the_gram_form() -> None:
    X = columns(3)[None].clone()
    X[0, :, 2::3] = 0.0
    side = pivoted_side(X, GRAM_LOSS[F64])
    assert side.matrix is X and not side.triangle[0, :, 2::3].any()
    assert_basis(side, X, [6], 1e-12)


def test_gram_sides_tell_which_modules_they_are_exact_for() -> None:
    good, bad, nan = (
        draw(50, 40, 8, torch.float32, 1, 0.5),
        draw(50, 40, 8, torch.float32, 2),
        draw(50, 40, 8, torch.float32),
    )
    bad.B[:, 7] = bad.B[:, 0] + 1e-5 * good.B[:, 1]
    nan.A[0, 0] = float("nan")
    left, right, exact = gram_sides([good, bad, nan])
    assert exact.tolist() == [True, False, False]
    delta = left.basis()[0] @ (left.triangle @ right.triangle.mT)[0] @ right.basis()[0].T
    torch.testing.assert_close(delta, good.delta(F64), rtol=1e-9, atol=1e-9)
