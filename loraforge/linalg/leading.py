"""Leading left singular vectors of a large dense matrix, by block Krylov steps with Rayleigh-Ritz.

    Q_0 = qr(M Omega);   Q_{j+1} = qr(M M^T Q_j, orthogonal to all before);   theta = eig(Q^T M M^T Q)

The exact way is an eigendecomposition of M M^T, 9 min(p, d)^3 operations of which half run at the speed of memory: on a
GPU it costs twenty times the Cholesky factorisation that comes before it. A step here costs 4 p d b, b = k + k / 8 + 8.

What is asked for is a subspace that keeps the most energy, so the steps end when one more gains less than TOLERANCE of
||M||_F^2; the result then lacks about a hundredth of that against the best one, also where the spectrum is flat. Single
vectors whose singular values lie closer together than that may still turn into each other.

Source: Musco and Musco, Randomized Block Krylov Methods, NeurIPS 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-8
STEPS = 12
ROUNDING = 1e-13  # of the sums that a rest of the energy is the difference of
SEED = 0


def leading_subspace(M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors of the k largest singular values.

    Args:
        M: (p, d) float64.
        k: How many; at most min(p, d).

    Returns:
        U (p, k) orthonormal, the largest entry of each column positive, and values (k + 1,) in falling order but the
        last, which is the Frobenius norm of what U leaves: their squares add up to ||M||_F^2.
    """
    p, d = M.shape
    block = min(k + k // 8 + 8, p, d)
    total = float(M.square().sum())
    # Drawn on the CPU: the same directions on every device.
    omega = torch.randn(d, block, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64).to(M.device)
    Q = torch.linalg.qr(M @ omega).Q
    basis, images = Q, M.mT @ Q
    values, vectors = torch.linalg.eigh(images.mT @ images)
    for _ in range(STEPS):
        # Nothing is left to find, or there is no room for a further block.
        if total - float(values.sum()) <= ROUNDING * total or basis.shape[1] + block > min(p, d):
            break
        Q = M @ images[:, -block:]
        for _ in range(2):  # once more removes what rounding left of the directions that are there
            Q = torch.linalg.qr(Q - basis @ (basis.mT @ Q)).Q
        basis, images = torch.cat([basis, Q], dim=1), torch.cat([images, M.mT @ Q], dim=1)
        before = float(values[-k:].sum())
        values, vectors = torch.linalg.eigh(images.mT @ images)
        if float(values[-k:].sum()) - before <= TOLERANCE * total:
            break
    S = values[-k:].flip(0).clamp_min(0.0)
    U = basis @ vectors[:, -k:].flip(1)
    rest = (total - S.sum()).clamp_min(0.0)
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    return U * torch.where(largest < 0, -1.0, 1.0), torch.cat([S, rest[None]]).sqrt()
