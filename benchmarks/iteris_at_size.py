"""`iteris-plus` end to end at the shapes of an 8B model, with what it costs by part.

    python -m benchmarks.iteris_at_size --device cuda --out iteris-8b.json
    python -m benchmarks.iteris_at_size --device cpu --dtype float32 --layers 4 --hidden 512 --intermediate 1792 \\
        --heads 8 --kv-heads 2 --vocab 8192 --samples 16 --length 128 --out iteris-cpu.json

A Llama model with random weights is made on the device, random adapters are written as PEFT folders, calibration sets
as .safetensors files; everything after that is `loraforge.merge`. The file of `--out` is written anew at every step.

What to expect at the defaults: 32 layers, h = 4096, i = 14336, 4 adapters, T = 4 x 32 x 256 = 32768 tokens, two folds.
F is a floating-point operation, B a byte; rates are those of one H200 (bfloat16 about 600 TF/s in products, float64
about 50, memory 4 TB/s), so the seconds are arithmetic and not measurements.

| part, per layer | operations or bytes | arithmetic | seconds |
|---|---|---|---|
| forwards of both streams | 2 x 2 T x 218 M weights | 29 TF bfloat16 | 0.07 |
| Grams X~X~, X X, and X X~ | three inputs of width h, one of width i: (2 + 2 x 1.12) T d^2 | 38 TF bfloat16 | 0.07 |
| their sums in float64 | per 4096 rows and product 20 d^2 B | 8 x 3 x 5.1 GB | 0.03 |
| energy of (X - X~) W0^T | 2 T x 218 M | 14 TF bfloat16 | 0.03 |
| search, d = i | about 7 points x 2 folds x d^3 / 3 | 14 TF float64 | 0.4 to 0.9 |
| search, d = h, six modules | 6 x 14 x h^3 / 3 | 2 TF float64 | 0.2 to 0.5 |
| W0 (C - G), half a solve | 3 m d^2 a module | 5 TF float64 | 0.1 |
| leading subspace of M (m, d) | 4 m d 80 a step, 3 to 8 steps | 0.2 TF float64 | 0.1 |

An exact eigendecomposition of M M^T (9 h^3 = 0.6 TF in five modules, half of it at the speed of memory) would cost more
than all else together: above 1024 rows a block Krylov method takes its place (`linalg/leading.py`). Together 1 to 2 s a
layer, 30 to 60 s for the model. With float32 rows (weights on samples, a fixed rho) Grams and energy take 1 s a layer.

Memory: weights 16 GB; inputs of all batches side by side at down_proj 2 x T x i x 2 B = 1.9 GB and as much again for
what gate and up left; sums of two folds 2 x 3 x i^2 x 8 B = 9.9 GB, one task's 3 more (4.9 GB), T2 and its factor
3.3 GB, W0 and M in float64 0.5 GB each. About 35 GB of the device's. Targets are kept as (R, d) factors: dense ones
would add 4 x 0.5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What is run: name -> (method, parameters beside the defaults). A sweep that is not verified bit for bit is reported,
# and not iterated on: nine more walks would say nothing about the cost of one.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "iteris-plus": ("iteris-plus", {"max_iter": 1}),
    "iteris-plus-delta": ("iteris-plus", {"max_iter": 1, "with_pretrain_matrix": 0}),
}


@dataclass(frozen=True)
class Size:
    """A Llama-shaped model, its adapters and its calibration data."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256
    adapters: int = 4
    rank: int = 16
    samples: int = 32
    length: int = 256

    @property
    def tokens(self) -> int:
        """Calibration tokens of all adapters together."""
        return self.adapters * self.samples * self.length

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of the linear modules of a layer."""
        h, i, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h),
            "gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i),
        }  # fmt: skip


def build_base(size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A Llama model with random weights, made on the device: no copy on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=max(2048, size.length), tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                # Each module keeps the size of its input; embeddings are of size one.
                std = 1.0 if "embed" in name else weight.shape[1] ** -0.5
                weight.normal_(0.0, std, generator=generator)
    return model.eval().requires_grad_(False)


def write_adapters(size: Size, folder: Path) -> list[Path]:
    """PEFT folders of random adapters in bfloat16; each moves a module's output by about a quarter of its size."""
    paths = []
    for task in range(size.adapters):
        g = torch.Generator().manual_seed(100 + task)
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(size.layers):
            for name, (m, n) in size.shapes.items():
                room = "self_attn" if name in TARGETS[:4] else "mlp"
                key = f"base_model.model.model.layers.{layer}.{room}.{name}"
                A = torch.randn(size.rank, n, generator=g) / n**0.5
                B = torch.randn(m, size.rank, generator=g) * (0.25 / size.rank**0.5)
                tensors[f"{key}.lora_A.weight"] = A.to(torch.bfloat16)
                tensors[f"{key}.lora_B.weight"] = B.to(torch.bfloat16)
        path = folder / f"task{task}"
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": size.rank, "lora_alpha": size.rank,
            "target_modules": list(size.shapes), "bias": "none",
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        paths.append(path)
    return paths


def write_calibration(size: Size, folder: Path) -> list[Path]:
    """One file of random token ids an adapter, each task from a part of the vocabulary of its own."""
    paths = []
    for task in range(size.adapters):
        g = torch.Generator().manual_seed(200 + task)
        share = size.vocab // size.adapters
        ids = torch.randint(task * share, (task + 1) * share, (size.samples, size.length), generator=g)
        path = folder / f"task{task}.safetensors"
        save_file({"input_ids": ids}, path)
        paths.append(path)
    return paths


class Account:
    """The results file, written anew at every step: a run that is cut off leaves what it knew."""

    def __init__(self, path: Path | None, content: dict[str, Any]) -> None:
        self.path, self.content, self._written = path, content, 0.0

    def write(self, *, at_once: bool = True) -> None:
        """Writes the file; not oftener than every two seconds unless `at_once`."""
        if self.path is None or (not at_once and time.perf_counter() - self._written < 2.0):
            return
        self._written = time.perf_counter()
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, self.path)

    @contextmanager
    def phase(self, into: dict[str, float], name: str) -> Iterator[None]:
        """Times a block."""
        started = time.perf_counter()
        yield
        into[name] = time.perf_counter() - started
        self.write()


def peak_device_bytes(device: torch.device) -> int | None:
    """Largest memory that torch has held on the device since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def by_kind(layers: list[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean residuals (share of the task models' output energy that is missed) of each kind of module."""
    found: dict[str, dict[str, float]] = {}
    for kind in TARGETS:
        rows = [layer for layer in layers if str(layer["module"]).endswith(kind)]
        found[kind] = {
            "plain mean of the adapters": sum(float(r["residual_before"]) for r in rows) / len(rows),
            "merged": sum(float(r["residual_after"]) for r in rows) / len(rows),
        }
    return found


def check_reload(path: Path, expected: int) -> dict[str, Any]:
    """Reads the written adapter again; every factor must be finite."""
    from loraforge import open_adapter

    adapter = open_adapter(path)
    bad = []
    for name in adapter.modules:
        pair = adapter.load(name)
        if not bool(torch.isfinite(pair.B.float().sum() + pair.A.float().sum())):
            bad.append(name)
    return {"modules": len(adapter.modules), "expected": expected, "not finite": bad,
            "ok": not bad and len(adapter.modules) == expected}  # fmt: skip


def merge_once(
    name: str, size: Size, base: nn.Module, device: torch.device, dtype: str, paths: list[Path], data: list[Path],
    folder: Path, batch_tokens: int, account: Account,
) -> dict[str, Any]:  # fmt: skip
    """One merge with its figures; the row is in the account from the start."""
    import loraforge as lf

    method, params = RUNS[name]
    row: dict[str, Any] = {"name": name, "method": method, "params": params, "state": "running"}
    account.content["runs"].append(row)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()

    def progress(stage: str, detail: str, done: int, total: int) -> None:
        row["reached"] = f"{stage} {detail}, {done} of {total}, {time.perf_counter() - started:.1f} s"
        account.write(at_once=False)

    out = folder / "merged" / name
    merged = lf.merge(
        paths, method=method, base=base, device=str(device), calibration=data, samples=size.samples,
        max_length=size.length, batch_tokens=batch_tokens, params={"base_dtype": dtype, **params}, out=out,
        progress=progress,
    )  # fmt: skip
    report = merged.report
    seconds = time.perf_counter() - started
    phases = {**report["phases"], "write": seconds - report["seconds"]}
    before = time.perf_counter()
    row["reload"] = check_reload(out, size.layers * len(size.shapes))
    phases["reload"] = time.perf_counter() - before
    iteris = report["iteris"]
    row |= {
        "state": "done" if row["reload"]["ok"] else "failed",
        "seconds": seconds,
        "phases": phases,
        "parts": iteris["seconds"],
        "converged": iteris["converged"],
        "verified": iteris["verified"],
        "tokens per second": size.tokens / seconds,
        "peak device bytes": peak_device_bytes(device),
        "peak rss bytes": report["peak_rss_bytes"],
        "residual": by_kind(iteris["layers"]),
        "solver": _count(str(layer["solver"]) for layer in iteris["layers"]),
        "alpha": _count(str(layer["alpha"]) for layer in iteris["layers"]),
        "rho": _count(str(layer["rho"]) for layer in iteris["layers"]),
        "kernels": report["kernels"],
        "warnings": report["warnings"],
    }
    operations = iteris.get("operations", {})
    grams = row["parts"].get("grams", 0.0)
    if "grams" in operations and grams > 0:
        row["gram tflops"] = operations["grams"] / grams / 1e12
    row["operations"] = operations
    account.write()
    return row


def _count(words: Iterator[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return found


def run(
    size: Size, *, device: torch.device, dtype: str, names: list[str], batch_tokens: int, out: Path | None,
    keep: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All merges of `names` on one model; what is returned is what `out` holds."""
    from loraforge.bench.machine import describe

    content: dict[str, Any] = {
        "what": "iteris-plus end to end on a Llama-shaped model with random weights",
        **describe(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype,
        "size": asdict(size),
        "tokens": size.tokens,
        "batch tokens": batch_tokens,
        "state": "running",
        "phases": {},
        "runs": [],
    }
    account = Account(out, content)
    account.write()
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        with account.phase(content["phases"], "build base"):
            base = build_base(size, device, getattr(torch, dtype))
        with account.phase(content["phases"], "write adapters"):
            paths = write_adapters(size, folder / "adapters")
            data = write_calibration(size, folder)
        for name in names:
            row = merge_once(name, size, base, device, dtype, paths, data, folder, batch_tokens, account)
            print(f"{name}: {row['seconds']:.1f} s, {row['state']}", flush=True)
    content["state"] = "done" if all(r["state"] == "done" for r in content["runs"]) else "failed"
    account.write()
    return content


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line says; 0 where every merge came out whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--method", nargs="+", default=["iteris-plus"], choices=list(RUNS))
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    from loraforge.linalg.device import choose_device

    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    size = Size(**{name: getattr(options, name) for name in asdict(Size())})
    content = run(
        size, device=choose_device(options.device), dtype=options.dtype, names=options.method,
        batch_tokens=options.batch_tokens, out=options.out,
    )  # fmt: skip
    print(json.dumps(content, indent=1))
    return 0 if content["state"] == "done" else 1


if __name__ == "__main__":
    raise SystemExit(main())
