from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from loraforge.errors import LoraforgeError
from loraforge.kernels import batched_core_svd, pick_rank, scale_write
from tests.kernels.conftest import SIZES

F64 = torch.float64


def _cores(rng, dtype, *shapes):
    return [torch.randn(*shape, generator=rng, dtype=F64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_svd_of_mixed_sizes_keeps_the_order_given(path, rng, dtype, workers, threads):
    threads(workers)
    cores = _cores(rng, dtype, (1, 1), (129, 129), (0, 5), (7, 0), (7, 97), (97, 7), (0, 0), (33, 33))
    for core, (U, S, Vh) in zip(cores, batched_core_svd(cores), strict=True):
        k = min(core.shape)
        assert (U.shape, S.shape, Vh.shape) == ((core.shape[0], k), (k,), (k, core.shape[1]))
        assert U.dtype == S.dtype == Vh.dtype == dtype
        plain_U, plain_S, plain_Vh = torch.linalg.svd(core, full_matrices=False)
        exact = np.linalg.svd(core.double().numpy(), compute_uv=False)
        tiny = 4 * torch.finfo(dtype).eps * (exact[0] if k else 0.0)
        if k:
            plain_error = np.abs(plain_S.double().numpy() - exact).max()
            assert np.abs(S.double().numpy() - exact).max() <= 2 * plain_error + tiny
            plain_back = ((plain_U * plain_S) @ plain_Vh - core).abs().max()
            assert ((U * S) @ Vh - core).abs().max() <= 2 * plain_back + tiny
    assert torch.get_num_threads() == workers


def test_svd_of_nothing_and_of_zeros_and_equal_rows(path):
    assert batched_core_svd([]) == []
    zero, flat = batched_core_svd([torch.zeros(7, 7), torch.ones(7, 7)])
    assert not zero[1].any() and torch.isfinite(zero[0]).all()
    assert flat[1][0].item() == pytest.approx(7.0, rel=1e-6) and flat[1][1:].abs().max() < 1e-5


def test_svd_takes_strided_cores_and_leaves_them_alone(path, rng):
    base = _cores(rng, F64, (97, 97))[0]
    before = base.clone()
    U, S, Vh = batched_core_svd([base[::2, 3:40].T])[0]
    torch.testing.assert_close((U * S) @ Vh, base[::2, 3:40].T, rtol=1e-12, atol=1e-12)
    assert torch.equal(base, before)


def test_svd_bits_do_not_depend_on_the_thread_count(rng, threads):
    cores = _cores(rng, torch.float32, *[(64, 64)] * 5, (129, 129))
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(batched_core_svd(cores))
    for run in found[1:]:
        assert all(torch.equal(x, y) for a, b in zip(run, found[0], strict=True) for x, y in zip(a, b, strict=True))


def test_svd_does_not_track_gradients_in_its_workers(path, rng, threads):
    threads(2)
    cores = [core.requires_grad_() for core in _cores(rng, F64, (5, 5), (7, 7))]
    assert not any(part.requires_grad for parts in batched_core_svd(cores) for part in parts)


def test_the_thread_count_comes_back_after_a_failure(monkeypatch, rng, threads):
    threads(2)

    def fail(core):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr("loraforge.kernels.core_svd._svd", fail)
    monkeypatch.setenv("LORAFORGE_KERNELS", "auto")
    with pytest.raises(LoraforgeError, match=r"cores\[1\](.|\n)*failed to converge"):
        batched_core_svd(_cores(rng, F64, (3, 3), (9, 9)))
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_a_worker_uses_one_blas_thread_and_the_caller_gets_its_own_back():
    """Counts the operating system's threads while the pool works: with BLAS threads inside, there would be more.

    MKL's own count is read from torch's report: it must be 1 inside and the caller's again after.
    """
    code = """
        import os, re, threading, time, torch
        from concurrent.futures import ThreadPoolExecutor
        from loraforge.kernels import core_svd
        def mkl():
            found = re.search(r"mkl_get_max_threads\\(\\) : (\\d+)", torch.__config__.parallel_info())
            return int(found[1]) if found else None
        torch.set_num_threads(3)
        big = torch.randn(512, 512)
        big @ big  # the caller's own team of threads starts here
        caller = mkl()
        assert caller in (3, None), caller
        plain = core_svd._svd
        seen, inside = [], set()
        def spy(core):
            result = plain(core)
            seen.append(len(os.listdir("/proc/self/task")))
            inside.add((torch.get_num_threads(), mkl()))
            return result
        core_svd._svd = spy
        before = len(os.listdir("/proc/self/task"))
        cores = [torch.randn(200, 200) for _ in range(9)]
        core_svd.batched_core_svd(cores)
        assert max(seen) <= before + 3, (before, seen)
        assert inside == {(1, None if caller is None else 1)}, inside
        until = time.monotonic() + 20  # a joined thread leaves the table a moment later
        while len(os.listdir("/proc/self/task")) > before:
            assert time.monotonic() < until, "workers are left over"
            time.sleep(0.01)
        assert torch.get_num_threads() == 3 and mkl() == caller
        other = []
        thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
        thread.start(); thread.join()
        assert other == [3], other
        with ThreadPoolExecutor(3) as pool:  # the control: without the setting, BLAS threads come on top of the workers
            list(pool.map(spy, cores))
        assert mkl() is None or max(seen) > before + 3, (before, seen)
        print("measured")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")},
    )
    assert done.stdout.strip() == "measured", done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_svd_refuses_what_is_not_finite_and_names_the_place(path, value):
    core = torch.zeros(3, 4)
    core[1, 2] = value
    with pytest.raises(LoraforgeError, match=r"cores\[1\]\[1, 2\]"):
        batched_core_svd([torch.zeros(2, 2), core])


def test_svd_refuses_other_dtypes_and_shapes(path):
    with pytest.raises(LoraforgeError, match=r"cores\[0\] has the wrong dtype(.|\n)*bfloat16"):
        batched_core_svd([torch.zeros(2, 2, dtype=torch.bfloat16)])
    with pytest.raises(LoraforgeError, match=r"cores\[0\] has the wrong shape(.|\n)*\(2, 2, 2\)"):
        batched_core_svd([torch.zeros(2, 2, 2)])


@pytest.mark.parametrize(
    ("S", "energy", "bounds", "rank"),
    [
        ([3.0, 1.0], 0.9, (1, None), 1),  # 9 of 10: the tie counts
        ([3.0, 1.0], 0.91, (1, None), 2),
        ([2.0, 1.0, 0.0], 1.0, (0, None), 2),
        ([2.0, 1.0, 0.0], 0.0, (0, None), 1),
        ([1.0] * 10, 0.35, (1, None), 4),
        ([1.0] * 10, 0.35, (6, None), 6),
        ([1.0] * 10, 0.95, (1, 3), 3),
        ([1.0, 1.0], 0.5, (5, 9), 2),  # never more than there is
        ([0.0, 0.0], 0.9, (0, None), 0),
        ([0.0, 0.0], 0.9, (1, None), 1),
        ([], 0.9, (1, None), 0),
        ([5.0], 1.0, (1, 1), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rank_examples(path, S, energy, bounds, rank, dtype):
    values = torch.tensor(S, dtype=dtype)
    got = pick_rank(values, energy, *bounds)
    assert got.shape == () and got.dtype == torch.int64 and got.item() == rank
    assert pick_rank(values.expand(3, -1), energy, *bounds).tolist() == [rank] * 3


@pytest.mark.parametrize("factor", [1e-300, 1.0, 1e300])
def test_rank_is_free_of_scale(path, rng, factor):
    S = torch.rand(7, 97, generator=rng, dtype=F64).sort(-1, descending=True).values
    assert torch.equal(pick_rank(S * factor, 0.9), pick_rank(S, 0.9))


@pytest.mark.parametrize("R", SIZES)
@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_rank_keeps_the_energy_and_one_less_does_not(path, rng, R, energy):
    S = torch.rand(5, R, generator=rng, dtype=F64).sort(-1, descending=True).values
    for row, rank in zip(S.square(), pick_rank(S, energy).tolist(), strict=True):
        assert row[:rank].sum() >= energy * row.sum() * (1 - 1e-14)
        assert rank == 1 or row[: rank - 1].sum() < energy * row.sum() * (1 + 1e-14)


def test_rank_of_no_spectra_and_of_strided_ones(path, rng):
    assert pick_rank(torch.zeros(0, 5), 0.9).shape == (0,)
    S = torch.rand(97, 6, generator=rng).sort(0, descending=True).values
    assert torch.equal(pick_rank(S.T[::2], 0.8), pick_rank(S.T[::2].contiguous(), 0.8))


def test_rank_refuses_what_does_not_fit(path):
    S = torch.ones(3)
    for arguments, words in [
        ((S, 1.1), ["energy", "1.1", "0 to 1"]),
        ((S, float("nan")), ["energy", "nan"]),
        ((S, 0.9, 4, 3), ["min_rank", "4", "max_rank (3)"]),
        ((S, 0.9, -1), ["min_rank", "-1"]),
        ((torch.tensor([1.0, float("nan")]), 0.9), ["S[1]", "nan"]),
        ((torch.ones(2, 2, 2), 0.9), ["tensor S", "(2, 2, 2)"]),
        ((S.half(), 0.9), ["tensor S", "float16"]),
    ]:
        with pytest.raises(LoraforgeError) as caught:
            pick_rank(*arguments)
        assert all(word in str(caught.value) for word in ["pick_rank", *words])


@pytest.mark.parametrize("to", [torch.float32, F64, torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("m", "n", "R", "rank"), [(97, 129, 7, 7), (97, 129, 7, 3), (1, 1, 1, 1), (7, 5, 4, 0)])
def test_scale_write_splits_evenly_and_rounds_last(path, rng, m, n, R, rank, dtype, to):
    U, S, Vh = (torch.randn(*shape, generator=rng, dtype=F64).to(dtype) for shape in ((m, R), (R,), (R, n)))
    S = S.abs()
    B, A = scale_write(U.T.contiguous().T, S, Vh, rank, to)
    assert B.is_contiguous() and A.is_contiguous() and B.dtype == A.dtype == (to or dtype)
    assert torch.equal(B, (U[:, :rank] * S[:rank].sqrt()).to(to or dtype))
    assert torch.equal(A, (S[:rank].sqrt()[:, None] * Vh[:rank]).to(to or dtype))


def test_scale_write_gives_the_best_factors_of_a_rank(path, rng):
    core = torch.randn(33, 33, generator=rng, dtype=F64)
    U, S, Vh = batched_core_svd([core])[0]
    B, A = scale_write(U, S, Vh, 5)
    assert torch.linalg.norm(core - B @ A).item() == pytest.approx(S[5:].square().sum().sqrt().item(), rel=1e-12)
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-12, atol=1e-12)


def test_scale_write_refuses_what_does_not_fit(path):
    U, S, Vh = torch.zeros(5, 3), torch.zeros(3), torch.zeros(3, 4)
    for arguments, words in [
        ((U, S, Vh, 4), ["rank", "4", "0 to 3"]),
        ((U[:, :2], S, Vh, 1), ["tensor U", "(5, 2)", "(m, 3)"]),
        ((U, S, Vh.double(), 1), ["tensor Vh", "float64", "float32"]),
        ((U, S, Vh, 1, torch.int8), ["dtype", "int8"]),
    ]:
        with pytest.raises(LoraforgeError) as caught:
            scale_write(*arguments)
        assert all(word in str(caught.value) for word in ["scale_write", *words])
