"""Bases and adapters on disk with the same numbers as dense matrices, for comparisons with the oracle.

Nothing of the package is used: safetensors and JSON are written as transformers and PEFT name them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.oracles import heads as oracle
from tests.oracles.heads import Matrix, Shape

PREFIX = "base_model.model."
_LLAMA = "model.layers.{i}.self_attn."
# Family -> template of the attention -> module of each part; `qkv` stands for a fused one.
NAMES: dict[str, dict[str, str]] = {
    "bert": {
        "q": "bert.encoder.layer.{i}.attention.self.query",
        "k": "bert.encoder.layer.{i}.attention.self.key",
        "v": "bert.encoder.layer.{i}.attention.self.value",
        "o": "bert.encoder.layer.{i}.attention.output.dense",
    },
    "deberta-v2": {
        "q": "deberta.encoder.layer.{i}.attention.self.query_proj",
        "k": "deberta.encoder.layer.{i}.attention.self.key_proj",
        "v": "deberta.encoder.layer.{i}.attention.self.value_proj",
        "o": "deberta.encoder.layer.{i}.attention.output.dense",
    },
    "llama": {part: f"{_LLAMA}{part}_proj" for part in "qkvo"},
    "qwen3": {part: f"{_LLAMA}{part}_proj" for part in "qkvo"},
    "phi3": {"qkv": f"{_LLAMA}qkv_proj", "o": f"{_LLAMA}o_proj"},
    "gpt2": {"qkv": "transformer.h.{i}.attn.c_attn", "o": "transformer.h.{i}.attn.c_proj"},
    "gpt_neox": {
        "qkv": "gpt_neox.layers.{i}.attention.query_key_value",
        "o": "gpt_neox.layers.{i}.attention.dense",
    },
}
FUSED = {"phi3": "stacked", "gpt2": "stacked", "gpt_neox": "interleaved"}


@dataclass(frozen=True)
class Case:
    """A base of a family and an adapter on it."""

    family: str
    shape: Shape
    d: int = 24
    layers: int = 2
    rank: int = 3
    alpha: float = 12.0
    rslora: bool = False
    targets: tuple[str, ...] = ("q", "k", "v", "qkv", "o")
    ranks: Mapping[str, int] = field(default_factory=dict)  # pattern as PEFT matches it: full end of the name
    alphas: Mapping[str, float] = field(default_factory=dict)
    biases: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """config.json, as far as heads can be read from it."""
        common = {"model_type": self.family, "torch_dtype": "float32", "vocab_size": 8}
        if self.family == "gpt2":
            return common | {"n_embd": self.d, "n_layer": self.layers, "n_head": self.shape.n_q, "n_positions": 8}
        common |= {"hidden_size": self.d, "num_hidden_layers": self.layers, "num_attention_heads": self.shape.n_q}
        common |= {"intermediate_size": 2 * self.d, "max_position_embeddings": 8}
        if self.family in ("llama", "qwen3", "phi3"):
            common |= {"num_key_value_heads": self.shape.n_kv, "head_dim": self.shape.qk}
        return common


@dataclass(frozen=True)
class Built:
    """Folders, and layer by layer what they hold as part -> (out, in)."""

    base: Path
    adapter: Path
    final: Path
    weights: list[dict[str, Matrix]]
    change: list[dict[str, Matrix]]
    bias_change: list[dict[str, Matrix]]

    def expected(self, shape: Shape, **options: Any) -> dict[tuple[int, int], dict[str, float | None]]:
        """The oracle's lines."""
        known = options.pop("known", True)
        return oracle.update_lines(self.change, self.weights if known else None, shape, **options)


def sizes(case: Case) -> dict[str, tuple[int, int]]:
    """Part -> (out, in)."""
    s = case.shape
    rows = {"q": s.n_q * s.qk, "k": s.n_kv * s.qk, "v": s.n_kv * s.vd}
    found = {part: (count, case.d) for part, count in rows.items()} | {"o": (case.d, s.n_q * s.vd)}
    found["qkv"] = (sum(rows.values()), case.d)
    return {part: found[part] for part in NAMES[case.family]}


def build(folder: Path, case: Case, seed: int = 0) -> Built:
    """Writes `base`, `adapter` and `final` (float32, base plus update plus noise on the biases) under `folder`."""
    rng = np.random.default_rng(seed)
    base: dict[str, Matrix] = {}
    factors: dict[str, Matrix] = {}
    final: dict[str, Matrix] = {}
    weights, change, bias_change = [], [], []
    conv = case.family == "gpt2"
    for i in range(case.layers):
        W, dW, db = {}, {}, {}
        for part, (out, into) in sizes(case).items():
            name = NAMES[case.family][part].format(i=i)
            W[part] = rng.standard_normal((out, into)).astype(np.float32)
            dW[part] = np.zeros((out, into))
            if part in case.targets:
                r, alpha = _of(case.ranks, name, case.rank), _of(case.alphas, name, case.alpha)
                A, B = (rng.standard_normal(size).astype(np.float32) for size in ((r, into), (out, r)))
                factors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
                dW[part] = oracle.delta(B, A, oracle.scale(int(r), alpha, rslora=case.rslora))
            base[f"{name}.weight"] = oracle.stored(W[part], conv1d=conv)
            final[f"{name}.weight"] = oracle.stored((W[part] + dW[part]).astype(np.float32), conv1d=conv)
            if case.biases:
                base[f"{name}.bias"], db[part] = rng.standard_normal((2, out)).astype(np.float32)
                final[f"{name}.bias"] = base[f"{name}.bias"] + db[part]
                db[part] = final[f"{name}.bias"].astype(np.float64) - base[f"{name}.bias"]
        weights.append(_parts(W, case))
        change.append(_parts(dW, case))
        bias_change.append(db)
    for name, tensors in (("base", base), ("final", final)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(case.config))
        save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, folder / name / "model.safetensors")
    (folder / "adapter").mkdir()
    modules = {NAMES[case.family][part].rsplit(".", 1)[1] for part in NAMES[case.family] if part in case.targets}
    settings = {
        "peft_type": "LORA", "r": case.rank, "lora_alpha": case.alpha, "use_rslora": case.rslora, "bias": "none",
        "rank_pattern": dict(case.ranks), "alpha_pattern": dict(case.alphas), "fan_in_fan_out": conv,
        "base_model_name_or_path": str(folder / "base"), "task_type": None,
        "target_modules": sorted(modules),
    }  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    return Built(folder / "base", folder / "adapter", folder / "final", weights, change, bias_change)


def _of(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if name == key or name.endswith(f".{key}")), default)


def _parts(W: dict[str, Matrix], case: Case) -> dict[str, Matrix]:
    """float64 parts; a fused weight is cut up."""
    W = {part: w.astype(np.float64) for part, w in W.items()}
    if "qkv" in W:
        fused = W.pop("qkv")
        W |= oracle.unfuse(fused, case.shape, FUSED[case.family])
    return W
