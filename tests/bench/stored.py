"""A small result by hand, for what reads results."""

from __future__ import annotations

from typing import Any


def row(group: str, case: str, form: str, seconds: float, **more: Any) -> dict[str, Any]:
    names = {"group": group, "case": case, "form": form, "device": "cpu", "op": case, "size": {}}
    figures = {
        "seconds": seconds, "iqr": seconds / 20, "runs": 5, "bytes": None, "flops": None, "gb_per_s": None,
        "gflop_per_s": None, "roofline": None, "error": 1e-7, "allowed": 1e-6, "ok": True, "peer": None,
        "speedup": None, "peak_bytes": None, "objective": None,
    }  # fmt: skip
    return names | figures | more


def stored_result(**more: Any) -> dict[str, Any]:
    rows = [
        row("kernels", "pick_rank 2 x R=3", "reference", 4e-3),
        row("kernels", "pick_rank 2 x R=3", "torch", 3e-3),
        row("kernels", "pick_rank 2 x R=3", "cpu", 2e-3, gb_per_s=5.0, gflop_per_s=0.5, roofline=0.25, speedup=1.5),
        row("kernels", "dcs_weights S=9", "reference", 1e-3),
        row("merge", "svd, rank 4 2 x 8x8, r=4", "loraforge", 1e-3, op="svd, rank 4"),
        row("merge", "svd, rank 4 2 x 8x8, r=4", "peft", 5e-2, op="svd, rank 4"),
        row("iteris", "BERT 1 x 8", "document", 4.0, peak_bytes=2**20, objective=0.4),
        row("iteris", "BERT 1 x 8", "sweep", 1.0, peak_bytes=2**19, objective=0.3, speedup=4.0),
        row("scale", "width 8", "loraforge", 1e-3, op="width", size={"width": 8}, peak_bytes=2**20),
        row("scale", "width 8", "torch", 1e-2, op="width", size={"width": 8}, peak_bytes=2**21),
        row("scale", "width 16", "loraforge", 2e-3, op="width", size={"width": 16}, peak_bytes=2**21),
    ]
    fits = [
        {"axis": "width", "form": "loraforge", "quantity": "seconds", "exponent": 1.0, "stderr": None, "points": 2},
        {"axis": "width", "form": "loraforge", "quantity": "peak_bytes", "exponent": 0.5, "stderr": 0.1, "points": 3},
    ]
    machine = {
        "machine": "a processor, 2 cores", "cores": 2, "threads": 1, "commit": "none", "date": "2026-01-02",
        "python": "3", "torch": "2", "gpu": None,
    }  # fmt: skip
    rates = {"float32": 5e10, "float64": 2e10, "bfloat16": 1e10}
    return {
        "schema": 1, "groups": ["kernels", "merge", "iteris", "scale"], "size": "tiny", "machine": machine,
        "device": "cpu", "clock": "processor", "ceilings": {"bytes_per_second": 1e10, "flops_per_second": rates},
        "rows": rows, "fits": fits, "failures": [], "seconds": 1.5,
        "skipped": [
            {"group": "kernels", "case": f"case {i}", "form": "cpu", "reason": "not built"} for i in range(3)
        ],
    } | more  # fmt: skip
