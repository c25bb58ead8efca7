"""Data-free merges of adapters on disk at the sizes of a 0.6B and an 8B model, and single modules beside dense forms.

`small`: 28 layers of q 2048x1024, k/v 1024x1024, o 1024x2048, gate/up 3072x1024, down 1024x3072, two adapters, rank 16.
`8b`: 32 layers of q/o 4096x4096, k/v 1024x4096, gate/up 14336x4096, down 4096x14336, eight adapters of rank 16, bf16.
Each merge is a process of its own: processor seconds of the merge without imports, peak memory of the process, and the
share of the time that went into reading the files. Entry-wise methods form the deltas densely, on one and on four such
layers: seconds for a gigabyte of float32 delta, and a peak memory that must not grow. `peers` are single modules.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python -m benchmarks.merge_at_size
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.merge_factored import make_adapters, make_peft
from loraforge.bench.machine import describe
from loraforge.linalg.factored import truncate_many
from loraforge.linalg.flatten import flatten_update
from loraforge.linalg.rank import RankRule
from loraforge.linalg.sketch import low_rank
from loraforge.merging.methods import find_method
from loraforge.types import LayerInputs, LowRank

RESULT = Path(__file__).parent / "results" / "merge-at-size.json"
SMALL = {
    "q_proj": (2048, 1024), "k_proj": (1024, 1024), "v_proj": (1024, 1024), "o_proj": (1024, 2048),
    "gate_proj": (3072, 1024), "up_proj": (3072, 1024), "down_proj": (1024, 3072),
}  # fmt: skip
LARGE = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip
CASES: dict[str, tuple[dict[str, tuple[int, int]], int, int, torch.dtype]] = {
    "small": (SMALL, 28, 2, torch.float32),
    "8b": (LARGE, 32, 8, torch.bfloat16),
    "8b-1-layer": (LARGE, 1, 8, torch.bfloat16),
    "8b-4-layers": (LARGE, 4, 8, torch.bfloat16),
}
RANK = 16
FACTORED = ("task-arithmetic", "svd", "iso-c", "tsv", "knots-ties")
STREAMED = ("ties", "dare")


def write_adapters(folder: Path, case: str) -> list[Path]:
    """The adapters of a case as PEFT folders: columns decay as i^-1/2, half of each task's input space is shared."""
    shapes, layers, count, dtype = CASES[case]
    decay = torch.arange(1, RANK + 1, dtype=torch.float32).rsqrt()
    paths = []
    for index in range(count):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(layers):
            for name, (m, n) in shapes.items():
                shared = torch.Generator().manual_seed(layer)
                own = torch.Generator().manual_seed(1000 * (index + 1) + layer)
                A = torch.randn(RANK, n, generator=own) / 32
                A[: RANK // 2] = torch.randn(RANK // 2, n, generator=shared) / 32
                key = f"base_model.model.model.layers.{layer}.block.{name}"
                tensors[f"{key}.lora_A.weight"] = A.to(dtype)
                tensors[f"{key}.lora_B.weight"] = (torch.randn(m, RANK, generator=own) * decay).to(dtype)
        path = folder / case / f"task{index}"
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(shapes), "bias": "none"}
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        paths.append(path)
    return paths


def child(method: str, out: str, *paths: str) -> None:
    """One merge in a process of its own; prints its figures."""
    import loraforge as lf

    lf.merge([paths[0]], method="concat", dry_run=True)  # imports are not part of the merge
    start, wall = time.process_time(), time.perf_counter()
    report = lf.merge(list(paths), method=method, out=out).report
    spent, lasted = time.process_time() - start, time.perf_counter() - wall
    phases = report["phases"]
    figures = {
        "cpu_seconds": spent,
        "seconds": lasted,
        "peak_rss_bytes": report["peak_rss_bytes"],
        "read_share": phases.get("read", 0.0) / lasted,
        "phases": phases,
        "kept_energy": report["kept_energy"],
        "rank_max": report["rank_max"],
    }
    print(json.dumps(figures))


def merge_in_child(method: str, paths: list[Path], folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [
            sys.executable,
            "-m",
            "benchmarks.merge_at_size",
            "--child",
            method,
            f"{out}/merged",
            *map(str, paths),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [key for key, value in runs[0].items() if isinstance(value, float | int)]
    return {key: statistics.median(run[key] for run in runs) for key in keys} | {
        "runs": len(runs),
        "phases": runs[-1]["phases"],
    }


def on_disk(folder: Path, cases: list[str], repeats: int) -> dict[str, Any]:
    """Merges of files, by case and method."""
    results: dict[str, Any] = {}
    for case in cases:
        paths = write_adapters(folder, case)
        methods = STREAMED if "layer" in case else FACTORED
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for _ in range(1 if "layer" in case else repeats):  # entry-wise methods take minutes here
            for method in methods:
                runs[method].append(merge_in_child(method, paths, folder))
        rows = {method: medians(found) for method, found in runs.items()}
        if "layer" in case:
            shapes, layers, count, _ = CASES[case]
            formed = 4e-9 * layers * count * sum(m * n for m, n in shapes.values())
            rows = {
                m: r | {"delta_gigabytes": formed, "cpu_seconds_a_gigabyte": r["cpu_seconds"] / formed}
                for m, r in rows.items()
            }
        results[case] = rows
        for method, row in rows.items():
            print(case, method, f"{row['cpu_seconds']:.2f} s", f"{row['peak_rss_bytes'] / 2**20:.0f} MiB", flush=True)
    return results


def cpu(job: Callable[[], object], repeats: int) -> float:
    """Median processor seconds."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        job()
        found.append(time.process_time() - start)
    return statistics.median(found)


def inputs(size: int, count: int) -> LayerInputs:
    """A square module of random factors."""
    g = torch.Generator().manual_seed(size)
    factors = [
        LowRank(torch.randn(size, RANK, generator=g), torch.randn(RANK, size, generator=g)) for _ in range(count)
    ]
    return LayerInputs("m", factors, [1.0] * count, [f"task{i}" for i in range(count)], [None] * count)


def ours_iso(layer: LayerInputs) -> LowRank:
    """iso-c as a merge does it: sum, cut at the numerical rank, flatten."""
    row = find_method("iso-c")
    cut = truncate_many([row.load_function()(layer, row.make_params())], RankRule())[0]
    return flatten_update(cut.factors, cut.spectrum, row.make_params())[0]


def dense_iso(layer: LayerInputs) -> torch.Tensor:
    """iso-c densely, restricted to the support as ours."""
    total = torch.stack([f.delta() for f in layer.factors if f is not None]).sum(0)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    p = RANK * len(layer.factors)
    return (U[:, :p] @ Vh[:p]) * (S[:p].sum() / p)


def ours_knots(layer: LayerInputs) -> LowRank:
    """knots-ties with thresholds of this module alone."""
    row = find_method("knots-ties")
    found: LowRank = row.load_function()(layer, row.make_params({"scope": "module"}))
    return found


def dense_knots(layer: LayerInputs) -> torch.Tensor:
    """knots-ties from the SVD of the dense deltas side by side."""
    deltas = [f.delta(torch.float64) for f in layer.factors if f is not None]
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    keep = S > 1e-10 * S[0]
    blocks = torch.stack((S[keep, None] * Vh[keep]).split(deltas[0].shape[1], dim=1))
    flat = blocks.flatten(1).abs()
    cut = flat.kthvalue(flat.shape[1] - int(0.2 * flat.shape[1]) + 1, dim=1).values
    blocks = torch.where(blocks.abs() >= cut[:, None, None], blocks, 0.0)
    agree = (blocks.sign() == blocks.sum(0).sign()) & (blocks != 0)
    return U[:, keep] @ ((blocks * agree).sum(0) / agree.sum(0).clamp_min(1))


def beside_dense(name: str, size: int, ours: Any, dense: Any, repeats: int) -> dict[str, Any]:
    """Processor seconds of a module, eight adapters, and that both give the same."""
    layer = inputs(size, 8)
    found, plain = ours(layer).delta(torch.float64), dense(layer).double()
    mine, theirs = cpu(lambda: ours(layer), max(repeats, 5)), cpu(lambda: dense(layer), repeats)
    print(name, size, f"dense is {theirs / mine:.1f} x ours", flush=True)
    return {
        "size": size, "adapters": 8, "rank": RANK, "cpu_seconds": mine, "dense_cpu_seconds": theirs,
        "times_ours": theirs / mine, "relative_difference": float((found - plain).norm() / plain.norm()),
    }  # fmt: skip


def beside_peft(repeats: int) -> dict[str, Any]:
    """`ties` with its cut to rank 16 on one layer of the small shapes, two adapters, against PEFT `ties_svd`."""
    warnings.simplefilter("ignore")  # PEFT warns once for each adapter that is added beside another
    adapters = make_adapters(1, RANK, seed=1)
    model = make_peft(adapters, 1, RANK)
    row = find_method("ties")
    layers = [
        LayerInputs(name, [adapters[0][name], adapters[1][name]], [0.5, 0.5], ["task0", "task1"], [None, None])
        for name in adapters[0]
    ]

    def ours() -> None:
        params = row.make_params({"scope": "module"})
        for layer in layers:
            low_rank(row.load_function()(layer, params), RankRule(rank=RANK), layer.module)

    def theirs() -> None:
        options = {"combination_type": "ties_svd", "svd_rank": RANK, "density": 0.2}
        model.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "merged", **options)
        model.delete_adapter("merged")

    mine, other = cpu(ours, repeats), cpu(theirs, repeats)
    print("ties", f"PEFT ties_svd is {other / mine:.1f} x ours", flush=True)
    return {"cpu_seconds": mine, "peft_cpu_seconds": other, "times_ours": other / mine}


def peers(repeats: int) -> dict[str, Any]:
    """Single modules against what others do with them."""
    return {
        "iso-c": beside_dense("iso-c", 2048, ours_iso, dense_iso, repeats),
        "knots-ties": beside_dense("knots-ties", 768, ours_knots, dense_knots, repeats),
        "ties": beside_peft(repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=None, help="Where the synthetic files go (1 GB); default: a temporary one."
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        child(*args.child)
        return
    report: dict[str, Any] = {"machine": {**describe(), "peft": version("peft")}, "peers": peers(args.repeats)}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report["on_disk"] = on_disk(Path(folder), args.cases, args.repeats)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
