"""SVD of many small cores, the rank that an energy asks for, and the split of the singular values over two factors.

A core is the small matrix that is left of a stack of low-rank factors after their QR. LAPACK on a core of rank 64 takes
a quarter of a millisecond; threads inside such a call cost more than they give, threads over the cores give all. On a
GPU the cores of one shape are one launch, see `jacobi`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from loraforge.errors import LoraforgeError
from loraforge.kernels import backend, jacobi
from loraforge.kernels.checks import FLOAT32_64, require, require_dtype, require_finite, require_number

_one_thread_lock = threading.Lock()


def batched_core_svd_reference(cores: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`batched_core_svd` in PyTorch: one after the other."""
    return [_svd(core) for core in cores]


def _svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return U, S, Vh


@contextmanager
def _one_blas_thread() -> Iterator[int]:
    """One BLAS thread while it is open; yields the caller's count and restores it.

    MKL's count belongs to the process and OpenMP's to each thread. The lock keeps two calls from taking the other's 1
    for the setting to go back to.
    """
    with _one_thread_lock:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield before
        finally:
            torch.set_num_threads(before)


@torch.no_grad()
def batched_core_svd(cores: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Thin SVD of every core: on the CPU in a pool of threads over the cores with one BLAS thread each.

    The pool has as many threads as `torch.get_num_threads()`. A core is always decomposed by one thread, so the bits do
    not depend on that number. On a GPU, cores of one shape go in one launch, and one look at the end tells how all
    went. Vectors are unique up to sign, and up to rotation where singular values coincide.

    Args:
        cores: (R_l, R_l') matrices, float32 or float64, of any sizes, 0 included.

    Returns:
        (U (R_l, k), S (k,), Vh (k, R_l')) with k = min(R_l, R_l') for each core, in the order given.

    Raises:
        LoraforgeError: A core is no matrix of those dtypes, holds a value that is not finite, or does not converge.
    """
    for index, core in enumerate(cores):
        require("batched_core_svd", f"cores[{index}]", core, ("R", "R'"), FLOAT32_64)
    if cores and all(core.device.type == "cuda" for core in cores):
        return _on_device(cores)
    for index, core in enumerate(cores):
        require_finite("batched_core_svd", f"cores[{index}]", core)
    if backend.mode() == "reference" or any(core.device.type != "cpu" for core in cores):
        backend.count("batched_core_svd", "reference")
        return batched_core_svd_reference(cores)
    backend.count("batched_core_svd", "threads")
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def work(index: int) -> None:
        with torch.no_grad():  # grad mode belongs to each thread
            try:
                found[index] = _svd(cores[index])
            except torch.linalg.LinAlgError as error:
                raise LoraforgeError(
                    "batched_core_svd: LAPACK could not decompose a core",
                    where=f"cores[{index}]",
                    got=error,
                    expected="a matrix whose SVD converges",
                ) from error

    largest_first = sorted(range(len(cores)), key=lambda i: -cores[i].numel())
    with _one_blas_thread() as threads:
        workers = min(threads, len(cores))
        if workers <= 1:
            for index in largest_first:
                work(index)
        else:
            with ThreadPoolExecutor(workers, "core-svd", initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(work, largest_first))
    return [found[index] for index in range(len(cores))]


def _on_device(cores: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Cores of one shape, dtype and GPU at a time; the host waits once for each GPU."""
    backend.count("batched_core_svd", "device")
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, core in enumerate(cores):
        groups.setdefault((core.shape, core.dtype, core.device), []).append(index)
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    infos: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for indices in groups.values():
        U, S, Vh, info = decompose_stack(torch.stack([cores[i] for i in indices]))
        found.update(zip(indices, zip(U.unbind(), S.unbind(), Vh.unbind(), strict=True), strict=True))
        infos.setdefault(info.device, []).extend(zip(indices, info.unbind(), strict=True))
    for of_device in infos.values():
        words = torch.stack([info for _, info in of_device]).tolist()
        for (index, _), word in zip(of_device, words, strict=True):
            _judge("batched_core_svd", f"cores[{index}]", cores[index], word)
    return [found[index] for index in range(len(cores))]


def decompose_stack(C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Thin SVDs that nobody waits for: the kernel up to its largest size, PyTorch's library calls above.

    Arguments and results are those of `jacobi.jacobi_svd`: what went wrong stands in `info`.
    """
    if max(C.shape[1:]) <= jacobi.LARGEST:
        return jacobi.jacobi_svd(C)
    backend.count("jacobi_svd", "library")
    return jacobi.jacobi_svd_reference(C)


def _judge(op: str, where: str, core: Tensor, info: int) -> None:
    """Refuses a core by what its decomposition says of itself."""
    if info == jacobi.NOT_FINITE:
        require_finite(op, where, core)
    if info < 0:
        raise LoraforgeError(
            f"{op}: a core could not be decomposed",
            where=where,
            got=f"no convergence after {jacobi.SWEEPS} sweeps",
            expected="a matrix whose SVD converges",
        )


@torch.no_grad()
def core_svd_stack(C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`batched_core_svd` of a stack of cores.

    Args:
        C: (b, R, R'), float32 or float64.

    Returns:
        U (b, R, k), S (b, k), Vh (b, k, R') with k = min(R, R').

    Raises:
        LoraforgeError: As `batched_core_svd`; the core is named by its place.
    """
    require("core_svd_stack", "C", C, ("b", "R", "R'"), FLOAT32_64)
    if C.device.type != "cuda":
        found = batched_core_svd(list(C.unbind()))
        if not found:
            U, S, Vh, _ = jacobi.jacobi_svd_reference(C)
            return U, S, Vh
        U, S, Vh = (torch.stack(parts) for parts in zip(*found, strict=True))
        return U, S, Vh
    U, S, Vh, info = decompose_stack(C)
    for index, word in enumerate(info.tolist()):
        _judge("core_svd_stack", f"C[{index}]", C[index], word)
    return U, S, Vh


def pick_rank_reference(S: Tensor, energy: float, min_rank: int, max_rank: int) -> Tensor:
    """`pick_rank` in PyTorch."""
    R = S.shape[-1]
    if R == 0:
        return torch.zeros(S.shape[:-1], dtype=torch.int64, device=S.device)
    s = S.double()
    # A power of two scales exactly: ties at the threshold stay ties, and no square over- or underflows.
    exponent = torch.frexp(s.amax(-1, keepdim=True)).exponent.clamp_min(-1000)
    head = torch.ldexp(s, -exponent).square().cumsum(-1)
    total = head[..., -1:]
    rank = torch.where(total[..., 0] > 0, (head < energy * total).sum(-1) + 1, 0)
    return rank.clamp(max=R).clamp_min(min_rank).clamp(max=min(max_rank, R))


@torch.no_grad()
def pick_rank(S: Tensor, energy: float, min_rank: int = 1, max_rank: int | None = None) -> Tensor:
    """The smallest rank that keeps a share of the energy: sum_{i<=k} S_i^2 >= energy sum_i S_i^2, full spectrum.

    Args:
        S: (R,) or (b, R) singular values, descending, float32 or float64.
        energy: Share of the squares to keep, 0 to 1; 1 drops nothing but zeros (and what float64 cannot tell from 0).
        min_rank: Least rank given, 0 or more; a spectrum of zeros gives it. It is cut to R where R is smaller.
        max_rank: Largest rank given; None for R.

    Returns:
        int64, of shape () or (b,).

    Raises:
        LoraforgeError: A shape, dtype or number does not fit, or a value is not finite.
    """
    require("pick_rank", "S", S, ("R",) if S.dim() == 1 else ("b", "R"), FLOAT32_64)
    require_finite("pick_rank", "S", S)
    most = max(S.shape[-1], min_rank) if max_rank is None else max_rank
    require_number("pick_rank", "energy", energy, 0.0, 1.0, "0 to 1")
    require_number("pick_rank", "min_rank", min_rank, 0, most, f"0 to max_rank ({most})")
    if backend.takes_native("pick_rank", S):
        return torch.ops.loraforge.pick_rank(S, energy, min_rank, most)
    return pick_rank_reference(S, energy, min_rank, most)


@backend.fake("pick_rank")
def _pick_rank_fake(S: Tensor, energy: float, min_rank: int, max_rank: int) -> Tensor:
    return S.new_empty(S.shape[:-1], dtype=torch.int64)


def scale_write_reference(U: Tensor, S: Tensor, Vh: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`scale_write` in PyTorch."""
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).to(dtype).contiguous(), (root[:, None] * Vh[:rank]).to(dtype).contiguous()


@torch.no_grad()
def scale_write(U: Tensor, S: Tensor, Vh: Tensor, rank: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The best factors of a rank: B = U_k sqrt(S_k) and A = sqrt(S_k) Vh_k.

    Args:
        U: (m, R) left vectors, float32 or float64, of any strides.
        S: (R,) singular values of the same dtype.
        Vh: (R, n) right vectors of the same dtype.
        rank: k, 0 to R.
        dtype: Dtype of the factors; None for that of S. The rounding is the last step.

    Returns:
        (B (m, k), A (k, n)), contiguous.

    Raises:
        LoraforgeError: A shape, dtype or the rank does not fit.
    """
    require("scale_write", "S", S, ("R",), FLOAT32_64)
    require("scale_write", "U", U, ("m", S.shape[0]), (S.dtype,))
    require("scale_write", "Vh", Vh, (S.shape[0], "n"), (S.dtype,))
    require_number("scale_write", "rank", rank, 0, S.shape[0], f"0 to {S.shape[0]}")
    wanted = S.dtype if dtype is None else dtype
    require_dtype("scale_write", wanted)
    if backend.takes_native("scale_write", U, S, Vh):
        return torch.ops.loraforge.scale_write(U, S, Vh, rank, wanted)
    return scale_write_reference(U, S, Vh, rank, wanted)


@backend.fake("scale_write")
def _scale_write_fake(U: Tensor, S: Tensor, Vh: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return U.new_empty((U.shape[0], rank), dtype=dtype), U.new_empty((rank, Vh.shape[1]), dtype=dtype)
