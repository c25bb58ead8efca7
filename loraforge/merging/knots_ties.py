"""KnOTS with TIES: align the adapters by one joint SVD, then trim, elect and average in the aligned space.

    [D_1 .. D_N] = U S [V_1^T .. V_N^T],    D_i = w_i s_i B_i A_i (m x n),    result = U ties(S V_1^T, .., S V_N^T)

U (m x p) is shared by all adapters, so entries of the blocks S V_i^T (p x n) speak of the same directions. p is the
numerical rank of the joint matrix, at most R, and so is the rank of the result: nothing has to be compressed again.
The SVD is that of the small [K_1 .. K_N], K_i = T_i R_i^T, with [w_1 s_1 B_1 ..] = Q [T_1 ..] and A_i^T = q_i R_i:
U = Q U_c and S V_i^T = (S V_c,i^T) q_i^T. Signs of the singular vectors do not matter to the rule; rotations within
equal singular values would. The trim's n counts p n entries a module. One adapter at density 1 comes back.

Source: Stoica et al., ICLR 2025, arXiv 2410.19735 (singular values cut at 1e-5 absolute there, relative to rounding
here); TIES as in `ties`.
Cost: (m + n) R^2 + R^3 and three passes over N blocks of p n entries.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.linalg.elements import Deltas, adds, deltas_of, elected, trim
from loraforge.linalg.rank import numerical_rank
from loraforge.linalg.thresholds import Layers, thresholds_over, trimmed_in
from loraforge.merging.elements_params import TrimParams
from loraforge.types import LayerInputs, LowRank


def survey(layers: Layers, params: TrimParams) -> list[float] | None:
    """The threshold of each adapter's blocks over all modules; None where each module has its own."""
    if params.scope != "global":
        return None
    return thresholds_over(layers, params.density, lambda layer: aligned(layer)[1])


def merge_layer(layer: LayerInputs, params: TrimParams) -> LowRank:
    """The merged factors of one module.

    Args:
        layer: Factors and weights; `context` has the survey's thresholds. Without a survey the module stands for the
            whole adapter.
        params: density and scope.

    Returns:
        B (m, p) with orthonormal columns, A (p, n), p <= R.

    Raises:
        LoraforgeError: Inputs are no factors, shapes differ or a factor holds NaN or Inf.
    """
    U, blocks = aligned(layer)
    thresholds = trimmed_in(blocks, params.density) if layer.context is None else layer.context
    return LowRank(U.to(blocks.dtype), elected(blocks, trim(thresholds)).delta())


def aligned(layer: LayerInputs) -> tuple[Tensor, Deltas]:
    """U (m, p) in float64 and the blocks S V_i^T (p, n) of a module, weights in them; p >= 1."""
    if not all(f is None or isinstance(f, LowRank) for f in layer.factors):
        raise LoraforgeError("KnOTS takes adapters, not full checkpoints", where=layer.module)
    plain = deltas_of(layer)
    pairs = {
        index: (f.B.to(torch.float64) * (w * f.scaling), f.A.to(torch.float64))
        for index, (w, f) in enumerate(zip(layer.weights, layer.factors, strict=True))
        if isinstance(f, LowRank) and adds(w, f, layer.module)
    }
    m, n = plain.shape
    if not pairs:
        empty = dataclasses.replace(plain, shape=(1, n))
        return torch.zeros(m, 1, dtype=torch.float64, device=plain.device), empty
    Q, triangle = torch.linalg.qr(torch.cat([B for B, _ in pairs.values()], dim=1))
    parts = triangle.split([B.shape[1] for B, _ in pairs.values()], dim=1)
    rights = [torch.linalg.qr(A.T) for _, A in pairs.values()]
    joint = torch.cat([T @ right.R.T for T, right in zip(parts, rights, strict=True)], dim=1)
    U, S, Vh = torch.linalg.svd(joint, full_matrices=False)
    p = max(1, numerical_rank(S.to(plain.dtype)))
    cores = (S[:p, None] * Vh[:p]).split([right.Q.shape[1] for right in rights], dim=1)
    factors: list[LowRank | None] = [None] * len(layer.factors)
    for index, core, right in zip(pairs, cores, rights, strict=True):
        factors[index] = LowRank(core, right.Q.T)
    blocks = deltas_of(LayerInputs(layer.module, factors, [1.0] * len(factors)))
    return Q @ U[:, :p], dataclasses.replace(blocks, dtype=plain.dtype)
