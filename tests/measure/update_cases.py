"""Small bases and adapters of several families on disk, and norms of their heads by numpy on dense matrices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.adapters.folders import config, factors, write_folder

HIDDEN = 16
LAYERS = 2


@dataclass(frozen=True)
class Case:
    """A family: names and shapes (out, in) of one layer's projections, and each head's rows or columns."""

    name: str
    config: dict[str, Any]
    modules: dict[str, tuple[int, int]]
    n_q: int
    n_kv: int
    # part -> (module, first index of a head, size); heads of k and v are key-value heads.
    spans: dict[str, tuple[str, list[int], int]]
    prefix: str = ""
    transposed: bool = False

    def rows(self, part: str, head: int) -> slice:
        _, starts, size = self.spans[part]
        start = starts[head * self.n_kv // self.n_q if part in "kv" else head]
        return slice(start, start + size)


def _blocks(heads: int, size: int, offset: int = 0, stride: int = 0) -> list[int]:
    return [offset + head * (stride or size) for head in range(heads)]


def _llama(name: str, n_q: int, n_kv: int, hd: int) -> Case:
    d = HIDDEN
    q, k, v, o = (f"layers.{{}}.self_attn.{part}_proj" for part in "qkvo")
    return Case(
        name,
        {"model_type": "llama", "num_attention_heads": n_q, "num_key_value_heads": n_kv, "head_dim": hd},
        {q: (n_q * hd, d), k: (n_kv * hd, d), v: (n_kv * hd, d), o: (d, n_q * hd)},
        n_q,
        n_kv,
        {"q": (q, _blocks(n_q, hd), hd), "k": (k, _blocks(n_kv, hd), hd), "v": (v, _blocks(n_kv, hd), hd),
         "o": (o, _blocks(n_q, hd), hd)},
        prefix="model.",
    )  # fmt: skip


def _gpt2() -> Case:
    d, h, s = HIDDEN, 4, 4
    qkv, o = "h.{}.attn.c_attn", "h.{}.attn.c_proj"
    spans = {part: (qkv, _blocks(h, s, at * d), s) for at, part in enumerate("qkv")}
    return Case("gpt2", {"model_type": "gpt2", "n_head": h}, {qkv: (3 * d, d), o: (d, d)}, h, h,
                spans | {"o": (o, _blocks(h, s), s)}, prefix="transformer.", transposed=True)  # fmt: skip


def _neox() -> Case:
    d, h, s = HIDDEN, 4, 4
    qkv, o = "layers.{}.attention.query_key_value", "layers.{}.attention.dense"
    spans = {part: (qkv, _blocks(h, s, at * s, 3 * s), s) for at, part in enumerate("qkv")}
    return Case("gpt_neox", {"model_type": "gpt_neox", "num_attention_heads": h}, {qkv: (3 * d, d), o: (d, d)}, h, h,
                spans | {"o": (o, _blocks(h, s), s)}, prefix="gpt_neox.")  # fmt: skip


CASES = {
    case.name: case
    for case in (_llama("mha", 4, 4, 4), _llama("gqa", 4, 2, 4), _llama("wide-heads", 4, 1, 6), _gpt2(), _neox())
}


def modules_of(case: Case, prefix: str | None = None) -> dict[str, tuple[int, int]]:
    """Full names of all layers' projections, with the prefix of the model with a head unless another is given."""
    before = case.prefix if prefix is None else prefix
    return {before + name.format(layer): shape for layer in range(LAYERS) for name, shape in case.modules.items()}


def write_base(
    folder: Path, case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, prefix: str | None = None,
    change: Mapping[str, Tensor] | None = None, extra: Mapping[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """A checkpoint with random weights; `change` (out, in) is added in float64 before the dtype is taken."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in modules_of(case, "").items():
        weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.float32).to(torch.float64)
        if change and name in change:
            weight = weight + change[name]
        weight = weight.mT if case.transposed else weight
        tensors[f"{case.prefix if prefix is None else prefix}{name}.weight"] = weight.to(dtype).contiguous()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case.config | {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN}))
    save_file(tensors | dict(extra or {}), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_adapter(
    folder: Path, case: Case, *, seed: int = 1, rank: int = 3, only: tuple[str, ...] = (),
    ranks: Mapping[str, int] | None = None, extra: Mapping[str, Tensor] | None = None, **settings: Any,
) -> Path:  # fmt: skip
    """An adapter of all projections, or of those whose names end with one of `only`."""
    shapes = {n: s for n, s in modules_of(case).items() if not only or n.endswith(only)}
    rank_of = {name: next((r for key, r in (ranks or {}).items() if name.endswith(key)), rank) for name in shapes}
    tensors = factors({name: (m, rank_of[name], n) for name, (m, n) in shapes.items()}, seed)
    tensors |= {"base_model.model." + name: tensor for name, tensor in (extra or {}).items()}
    known = {"r": rank, "lora_alpha": 2 * rank, "fan_in_fan_out": case.transposed, "base_model_name_or_path": None}
    return write_folder(folder, tensors, config(**known | settings))


def dense_updates(adapter: Path, case: Case, scale: float | Mapping[str, float] = 2.0) -> dict[str, np.ndarray]:
    """Module without prefix -> scale * B A in numpy float64, read straight from the file."""
    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name in modules_of(case, ""):
        key = f"base_model.model.{case.prefix}{name}.lora_"
        if f"{key}A.weight" in tensors:
            A, B = (tensors[f"{key}{side}.weight"].astype(np.float64) for side in "AB")
            one = scale if isinstance(scale, float) else next(v for k, v in scale.items() if name.endswith(k))
            found[name] = one * (B @ A)
    return found


def weights_of(folder: Path, case: Case, prefix: str | None = None) -> dict[str, np.ndarray]:
    """Module without prefix -> weight (out, in), numpy float64."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    before = case.prefix if prefix is None else prefix
    found = {name: tensors[f"{before}{name}.weight"].double().numpy() for name in modules_of(case, "")}
    return {name: weight.T if case.transposed else weight for name, weight in found.items()}


def slice_of(case: Case, matrices: Mapping[str, np.ndarray], layer: int, part: str, head: int) -> np.ndarray | None:
    """A head's slice of a part, None where the module is not there."""
    name = case.spans[part][0].format(layer)
    if name not in matrices:
        return None
    rows = case.rows(part, head)
    return matrices[name][:, rows] if part == "o" else matrices[name][rows]


def norms_by_hand(
    case: Case, matrices: Mapping[str, np.ndarray], layer: int, head: int, share: bool = True
) -> dict[str, float]:
    """Frobenius norm of each part of a head; key and value shared among the heads of a group."""
    found = {}
    for part in "qkvo":
        piece = slice_of(case, matrices, layer, part, head)
        factor = np.sqrt(case.n_kv / case.n_q) if share and part in "kv" else 1.0
        found[part] = 0.0 if piece is None else factor * np.sqrt((piece**2).sum())
    return found
