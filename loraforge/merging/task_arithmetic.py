"""Task arithmetic: the exact weighted sum of the deltas.

delta = sum_i w_i s_i B_i A_i with w_i = 1 unless given; s_i = alpha_i / r_i (alpha_i / sqrt(r_i) for rsLoRA). The
factors are set side by side, so the sum holds cross terms of no kind and its rank is at most R = sum r_i.

Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089. Cost: one copy of the factors.
"""

from __future__ import annotations

from loraforge.linalg.factored import weighted_sum
from loraforge.merging.methods import NoParams
from loraforge.types import LayerInputs, Update


def merge_layer(layer: LayerInputs, params: NoParams) -> Update:
    """Weighted sum of one module: B (m, R), A (R, n), scaling 1; of full checkpoints the dense (m, n) sum.

    Args:
        layer: Factors and weights of the module.
        params: Nothing to set.

    Returns:
        The exact sum, before any rank rule.
    """
    return weighted_sum(layer.present)
