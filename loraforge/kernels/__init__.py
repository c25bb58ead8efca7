"""Operators with a compiled and a PyTorch form under one name; the form is picked at call time (see `backend`)."""

from loraforge.kernels.anderson import anderson_dots, anderson_mix
from loraforge.kernels.backend import LoraforgeKernelNotice, kernel_report, native_available, self_test
from loraforge.kernels.core_svd import batched_core_svd, pick_rank, scale_write
from loraforge.kernels.covariance import cov_fold_, cov_pack, gram_
from loraforge.kernels.dcs import DcsWeights, dcs_variance, dcs_weights

__all__ = [
    "DcsWeights",
    "LoraforgeKernelNotice",
    "anderson_dots",
    "anderson_mix",
    "batched_core_svd",
    "cov_fold_",
    "cov_pack",
    "dcs_variance",
    "dcs_weights",
    "gram_",
    "kernel_report",
    "native_available",
    "pick_rank",
    "scale_write",
    "self_test",
]
