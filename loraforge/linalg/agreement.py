"""How much updates of one module agree: inner products, overlap of their subspaces, entries of opposite sign.

With D_i = Q_i C_i P_i^T (Q_i, P_i orthonormal, from QR of the factors):

    <D_i, D_j> = tr(C_i^T (Q_i^T Q_j) C_j (P_j^T P_i))
    overlap of outputs = ||Q_i^T Q_j||_F^2 / min(p_i, p_j), the mean squared cosine of the principal angles between the
        column spaces; of inputs the same with P (row spaces). Two random p-dimensional ones of R^m overlap by p / m.
    sign conflict = share of the entries, nonzero in both, at which the signs differ (1/2 for unrelated updates).

Cost: (m + n) R^2 for the first three. Signs are looked at on a grid of evenly spaced rows and columns where the module
has more than `entries`; everything else is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.bases import sides
from loraforge.linalg.rank import numerical_rank
from loraforge.types import LowRank

# Entries of a module whose signs are looked at.
ENTRIES = 2**20
_BLOCK = 2**22  # entries of all updates that are formed at a time; integers up to 2^24 are exact in float32


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """Sums of one module, so that modules can be added up; all (N, N) float64 on the CPU, 0 where one is missing.

    Attributes:
        inner: <D_i, D_j>.
        overlap_out: ||Q_i^T Q_j||_F^2.
        overlap_in: ||P_i^T P_j||_F^2.
        dims_out: min(p_i, p_j) of the column spaces.
        dims_in: min(p_i, p_j) of the row spaces.
        shared: 1 where both have the module in one shape.
        differing: Entries at which the signs differ, scaled up from those that were looked at.
        compared: Entries that are nonzero in both, likewise.
        spectra: Singular values of each update, (min(r, m, n),) float64, descending; None where it is missing.
    """

    inner: Tensor
    overlap_out: Tensor
    overlap_in: Tensor
    dims_out: Tensor
    dims_in: Tensor
    shared: Tensor
    differing: Tensor
    compared: Tensor
    spectra: Sequence[Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """One update between orthonormal bases: D = Q C P^T, and bases of its spaces without numerically absent columns."""

    Q: Tensor
    C: Tensor
    P: Tensor
    out: Tensor
    into: Tensor
    spectrum: Tensor


def agreement(updates: Sequence[LowRank | None], entries: int = ENTRIES) -> Agreement:
    """Compares the updates of one module.

    Args:
        updates: One an adapter, None where it lacks the module; those of one shape are compared with each other.
        entries: Entries whose signs are looked at, about; all where the module has no more.

    Returns:
        The sums; an update of zeros has no directions and no signs.

    Raises:
        LoraforgeError: A factor holds NaN or Inf.
    """
    N = len(updates)
    splits = [None if update is None else _split(update) for update in updates]
    inner, out, into, dims_out, dims_in, shared, differing, compared = torch.zeros(8, N, N, dtype=torch.float64)
    for members in _of_one_shape(updates):
        parts = [split for i in members if (split := splits[i]) is not None]
        Q, P = _cross([s.Q for s in parts]), _cross([s.P for s in parts])
        U, V = _cross([s.out for s in parts]), _cross([s.into for s in parts])
        places = list(combinations_with_replacement(enumerate(members), 2))
        numbers = [
            torch.stack([
                (parts[a].C * (Q[a][b] @ parts[b].C @ P[b][a])).sum(), U[a][b].square().sum(), V[a][b].square().sum(),
            ])
            for (a, _), (b, _) in places
        ]  # fmt: skip
        # All pairs are asked for before the first is read: a GPU works on while the host waits once.
        for ((a, i), (b, j)), found in zip(places, torch.stack(numbers).tolist(), strict=True):
            one, other = parts[a], parts[b]
            inner[i, j] = inner[j, i] = found[0]
            out[i, j] = out[j, i] = found[1]
            into[i, j] = into[j, i] = found[2]
            dims_out[i, j] = dims_out[j, i] = min(one.out.shape[1], other.out.shape[1])
            dims_in[i, j] = dims_in[j, i] = min(one.into.shape[1], other.into.shape[1])
        index = torch.tensor(members)
        pairs = (index[:, None], index[None, :])
        shared[pairs] = 1.0
        differing[pairs], compared[pairs] = _signs([updates[i] for i in members], entries)
    spectra = [None if split is None else split.spectrum.cpu() for split in splits]
    return Agreement(inner, out, into, dims_out, dims_in, shared, differing, compared, spectra)


def _of_one_shape(updates: Sequence[LowRank | None]) -> list[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for i, update in enumerate(updates):
        if update is not None:
            groups.setdefault(update.shape, []).append(i)
    return list(groups.values())


def _split(update: LowRank) -> _Split:
    left, right = sides([update], "qr")
    C = left.triangle[0] @ right.triangle[0].T
    U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    # What lies under the rounding of the factors' own dtype is no direction of the update.
    dtype = torch.float64 if update.B.dtype == torch.float64 else torch.float32
    p = numerical_rank(S.to(dtype))
    Q, P = left.basis()[0], right.basis()[0]
    return _Split(Q, C, P, Q @ U[:, :p], P @ Vh[:p].T, S)


def _cross(bases: Sequence[Tensor]) -> list[list[Tensor]]:
    """Q_i^T Q_j of all pairs, by one product."""
    widths = [Q.shape[1] for Q in bases]
    stacked = torch.cat(list(bases), dim=1)
    return [list(row.split(widths, dim=1)) for row in (stacked.T @ stacked).split(widths)]


def _signs(updates: Sequence[LowRank | None], entries: int) -> tuple[Tensor, Tensor]:
    """(entries of opposite sign, entries nonzero in both), (N, N) each, for the whole module, on the CPU."""
    found = [update for update in updates if update is not None]
    if entries < 1:
        raise LoraforgeError("the number of entries is out of range", got=entries, expected="1 or more")
    m, n = found[0].shape
    side = math.isqrt(entries)
    device = found[0].B.device
    rows = _spaced(m, max(side, entries // n)).to(device)
    columns = _spaced(n, max(side, entries // m)).to(device)
    N = len(found)
    signed, both = torch.zeros(2, N, N, dtype=torch.float64, device=device)
    block = max(1, _BLOCK // (N * len(columns)))
    # Of the scaling only the sign counts (and 0: then there is no entry).
    factors = [(_wide(u.B[rows]) * math.copysign(u.scaling != 0.0, u.scaling), _wide(u.A[:, columns])) for u in found]
    for start in range(0, len(rows), block):
        signs = torch.stack([B[start : start + block] @ A for B, A in factors]).sign_().reshape(N, -1)
        signed += signs @ signs.T
        signs.abs_()
        both += signs @ signs.T
    share = len(rows) * len(columns) / (m * n)
    signed, both = signed.cpu(), both.cpu()
    return (both - signed) / (2 * share), both / share


def _spaced(count: int, wanted: int) -> Tensor:
    """All indices below `count`, or `wanted` of them evenly spaced."""
    if count <= wanted:
        return torch.arange(count)
    return (torch.arange(wanted, dtype=torch.float64) * (count / wanted)).to(torch.int64)


def _wide(factor: Tensor) -> Tensor:
    """In float32: a sign needs no more, and counts below 2^24 are exact in it."""
    return factor.to(torch.float32)
