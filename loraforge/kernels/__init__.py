"""Operators with a compiled and a PyTorch form under one name; the form is picked at call time (see `backend`)."""

from loraforge.kernels.anderson import anderson_dots, anderson_mix
from loraforge.kernels.backend import LoraforgeKernelNotice, kernel_report, native_available, self_test
from loraforge.kernels.consistency import consistency_backward, consistency_forward, consistency_sum
from loraforge.kernels.consistency_loss import consistency_loss
from loraforge.kernels.core_svd import batched_core_svd, core_svd_stack, pick_rank, scale_write
from loraforge.kernels.covariance import cov_fold_, cov_pack, gram_
from loraforge.kernels.dcs import DcsBatch, DcsWeights, dcs_batch, dcs_variance, dcs_weights
from loraforge.kernels.entry_counts import entry_counts_
from loraforge.kernels.entrywise import drop_rescale_, entry_merge
from loraforge.kernels.gram_cholesky import GramFactor, gram_factor
from loraforge.kernels.jacobi import jacobi_svd

__all__ = [
    "DcsBatch",
    "DcsWeights",
    "GramFactor",
    "LoraforgeKernelNotice",
    "anderson_dots",
    "anderson_mix",
    "batched_core_svd",
    "consistency_backward",
    "consistency_forward",
    "consistency_loss",
    "consistency_sum",
    "core_svd_stack",
    "cov_fold_",
    "cov_pack",
    "dcs_batch",
    "dcs_variance",
    "dcs_weights",
    "drop_rescale_",
    "entry_counts_",
    "entry_merge",
    "gram_",
    "gram_factor",
    "jacobi_svd",
    "kernel_report",
    "native_available",
    "pick_rank",
    "scale_write",
    "self_test",
]
