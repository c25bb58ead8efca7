"""The core of a module: orthonormal bases of all adapters' factors, and each delta as a small matrix between them.

With L = [w_1 s_1 B_1 | ...] (m, R) and A = [A_1; ...] (R, n): thin QR of both sides, then a rank trim by the SVD of
each triangle, gives Q_l (m, p), Q_a (n, q) and blocks C_i (p, q) with

    w_i D_i = w_i s_i B_i A_i = Q_l C_i Q_a^T   exactly (to rounding, float64).

Q_l are the left singular vectors of L and Q_a the right ones of A, signs fixed: the convention of core space merging
(Panariello et al., arXiv 2509.17786). Whatever a spectral rule does to the m x n matrices it does to the blocks:
orthonormal factors pass through an SVD. Full checkpoints have identity bases: their blocks are the task vectors.

Cost: 2 (m + n) R^2 + O(R^3) and (m + n) R memory, against m n min(m, n) and N m n densely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.bases import column_signs
from loraforge.linalg.rank import numerical_rank
from loraforge.types import Dense, LayerInputs, LowRank, Update


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """The deltas of one module between shared bases, everything float64.

    Attributes:
        left: (m, p) orthonormal columns, or None for the identity.
        right: (n, q) orthonormal columns, or None for the identity.
        blocks: C_i (p, q) with weight and scaling folded in, one an adapter; None where it lacks the module.
        dtype: Dtype of the result: float64 where any input is, else float32.
        cut_dtype: Dtype whose rounding the inputs carry: what is under it is no direction.
    """

    left: Tensor | None
    right: Tensor | None
    blocks: Sequence[Tensor | None]
    dtype: torch.dtype
    cut_dtype: torch.dtype

    @property
    def present(self) -> list[Tensor]:
        """The blocks of the adapters that have the module."""
        return [block for block in self.blocks if block is not None]

    def total(self) -> Tensor:
        """Sum of the blocks, (p, q)."""
        return torch.stack(self.present).sum(dim=0)

    def lift(self, M: Tensor) -> Update:
        """Q_l M Q_a^T for M (p, q): a LowRank of rank min(p, q), or Dense where the bases are identities."""
        if self.left is None or self.right is None:
            return Dense(M.to(self.dtype))
        p, q = M.shape
        B, A = (self.left @ M, self.right.T) if q <= p else (self.left, M @ self.right.T)
        return LowRank(B.to(self.dtype).contiguous(), A.to(self.dtype).contiguous())

    def lift_triplets(self, U: Tensor, S: Tensor, V: Tensor) -> Update:
        """Q_l U diag(S) V^T Q_a^T for U (p, k), S (k,), V (q, k), sqrt(S) on both sides; zeros of rank 1 for k = 0."""
        if S.numel() == 0:
            U, S, V = U.new_zeros(U.shape[0], 1), S.new_zeros(1), V.new_zeros(V.shape[0], 1)
        root = S.sqrt()
        B, A = U * root, (V * root).T
        if self.left is None or self.right is None:
            return Dense((B @ A).to(self.dtype))
        return LowRank((self.left @ B).to(self.dtype), (A @ self.right.T).to(self.dtype).contiguous())


def core_of(layer: LayerInputs, *, weighted: bool = True) -> Core:
    """The core of a module.

    Args:
        layer: Factors (or task vectors) and weights of the module.
        weighted: Fold w_i into the blocks.

    Returns:
        Bases and blocks. Directions below the rounding of the inputs are dropped, so linearly dependent adapters give a
        smaller core; p = q = 0 cannot occur: a module of zeros keeps one direction. An adapter whose delta is exactly 0
        has no block, as if it lacked the module, unless all are 0.

    Raises:
        LoraforgeError: No adapter has the module, shapes differ, or a factor holds NaN or Inf.
    """
    pairs = [(w if weighted else 1.0, f) for w, f in zip(layer.weights, layer.factors, strict=True)]
    present = [f for _, f in pairs if f is not None]
    if not present or len({(type(f), f.shape) for f in present}) > 1:
        raise LoraforgeError(
            "The deltas of a module do not fit together",
            where=layer.module,
            got=[(type(f).__name__, f.shape) for f in present],
            expected="one shape, and adapters or full checkpoints but not both",
        )
    moving = _moving(pairs)
    if any(moving):
        pairs = [(w, f if own else None) for (w, f), own in zip(pairs, moving, strict=True)]
        present = [f for _, f in pairs if f is not None]
    if all(isinstance(f, Dense) for f in present):
        dtype = torch.float64 if any(f.delta().dtype == torch.float64 for f in present) else torch.float32
        found = [None if f is None else f.delta(torch.float64) * w for w, f in pairs]
        if not all(bool(torch.isfinite(block).all()) for block in found if block is not None):
            raise LoraforgeError("A task vector holds NaN or Inf", where=layer.module)
        return Core(None, None, found, dtype, layer.rounding or dtype)
    low = [(w, f if isinstance(f, LowRank) else None) for w, f in pairs]
    wide = any(t.dtype == torch.float64 for _, f in low if f is not None for t in (f.B, f.A))
    dtype = torch.float64 if wide else torch.float32
    stacked = [(f.B.to(torch.float64) * (w * f.scaling), f.A.to(torch.float64)) for w, f in low if f is not None]
    B, A = torch.cat([b for b, _ in stacked], dim=1), torch.cat([a for _, a in stacked], dim=0)
    # (c B, A / c) is the same adapter: what is rounding is judged with both factors of each at one size.
    balance = torch.cat([(_norm(a) / _norm(b)).sqrt().expand(b.shape[1]) for b, a in stacked])
    cut = layer.rounding or dtype
    (left, over), (right, under) = _bases((B, A.T), (balance, 1.0 / balance), cut)
    blocks: list[Tensor | None] = []
    start = 0
    for _, f in low:
        if f is None:
            blocks.append(None)
            continue
        part = slice(start, start + f.rank)
        blocks.append(over[:, part] @ under[:, part].T)
        start += f.rank
    return Core(left, right, blocks, dtype, cut)


def _moving(pairs: Sequence[tuple[float, Update | None]]) -> list[bool]:
    """Which weighted deltas are there and not 0 because a factor of them is; a GPU is asked once for all."""
    found = [f is not None and w * f.scaling != 0.0 for w, f in pairs]
    asked: list[tuple[int, Tensor]] = []
    for place, (_, f) in enumerate(pairs):
        if f is not None and found[place]:
            asked += [(place, t.any()) for t in ((f.weight,) if isinstance(f, Dense) else (f.B, f.A))]
    answers = torch.stack([answer for _, answer in asked]).tolist() if asked else []
    for (place, _), answer in zip(asked, answers, strict=True):
        found[place] &= answer
    return found


def _norm(factor: Tensor) -> Tensor:
    """Frobenius norm, 1 for zeros."""
    size: Tensor = torch.linalg.matrix_norm(factor)
    return torch.where(size > 0.0, size, 1.0)


def _bases(
    columns: tuple[Tensor, Tensor], balance: tuple[Tensor, Tensor], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Of both sides: left singular vectors Q (rows, p) of the columns (rows, R), and Q^T columns (p, R).

    p is the numerical rank of the columns multiplied by `balance` (R,).
    """
    reduced = [torch.linalg.qr(one) for one in columns]
    if not bool(torch.stack([torch.isfinite(triangle).all() for _, triangle in reduced]).all()):
        raise LoraforgeError("Factors hold NaN or Inf", got=[tuple(one.shape) for one in columns])
    spectra = [torch.linalg.svdvals(triangle * b) for (_, triangle), b in zip(reduced, balance, strict=True)]
    spectra = list(torch.cat(spectra).to(dtype).cpu().split([len(S) for S in spectra]))
    found = []
    for (Q, triangle), S in zip(reduced, spectra, strict=True):
        U = torch.linalg.svd(triangle, full_matrices=False)[0][:, : max(1, numerical_rank(S))]
        basis = Q @ U
        sign = column_signs(basis)
        # Not diag(S) Vh: products keep the digits of small columns beside large ones.
        found.append((basis * sign, (U * sign).T @ triangle))
    return found
