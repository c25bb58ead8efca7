"""Real adapters through reader, sum, cut, writer and reader, against the dense optimum in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from loraforge.adapters import all_modules, check_compatible, open_adapter, output_dtype, resolve_heads, write_adapter
from loraforge.linalg.factored import stack, truncate_many
from loraforge.linalg.rank import RankRule
from loraforge.types import LowRank
from tests.oracles import factored as oracle

PAIRS = [
    (("distilbert-imdb", "distilbert-hate"), (0.5, 0.5)),
    (("bert-base-a32", "bert-base-sst2-a16"), (1.0, 1.0)),
    (("gpt2-cattn-a8", "gpt2-cattn-a16"), (0.7, -0.4)),
    (("flan-t5-base-r16-final", "flan-t5-base-r16-step1000"), (0.5, 0.5)),
    (("opt125m-r16",), (1.0,)),
]


def dense(parts: list[tuple[float, LowRank]]) -> np.ndarray:
    return oracle.dense_sum([(w, lr.scaling, lr.B.double().numpy(), lr.A.double().numpy()) for w, lr in parts])


@pytest.mark.parametrize(("names", "weights"), PAIRS)
def test_written_deltas_are_the_exact_ones_or_the_optimum(
    data_dir: Path, tmp_path: Path, names: tuple[str, ...], weights: tuple[float, ...]
) -> None:
    adapters = [open_adapter(data_dir / "adapters" / name) for name in names]
    check_compatible(adapters)
    modules = all_modules(adapters)
    parts = {m: [(w, a.load(m)) for w, a in zip(weights, adapters, strict=True)] for m in modules}
    sums = [stack(parts[m]) for m in modules]
    heads = resolve_heads(adapters)
    k = adapters[0].info(modules[0]).rank
    cuts = {rule: truncate_many(sums, rule) for rule in (RankRule(), RankRule(rank=k))}
    for index, (rule, found) in enumerate(cuts.items()):
        written = ((m, cut.factors) for m, cut in zip(modules, found, strict=True))
        out = open_adapter(write_adapter(tmp_path / str(index), written, adapters, heads=heads))
        assert out.modules == tuple(modules) and out.base == adapters[0].base
        # A dense float64 decomposition of 768 x 768 takes long: a few modules of each pair are compared in full.
        for m, cut in list(zip(modules, found, strict=True))[:: max(1, len(modules) // 4)]:
            exact, delta = dense(parts[m]), out.load(m).delta(torch.float64).numpy()
            size = float(np.linalg.norm(exact))
            if rule.is_lossless:
                assert oracle.relative(delta, exact) < 2e-6
            else:
                best, error = oracle.best_rank_k(exact, k)
                assert abs(float(np.linalg.norm(delta - exact)) - error) < 2e-6 * size
                assert abs(cut.error - error) < 2e-6 * size and cut.rank == k


def test_flan_t5_optimum(data_dir: Path) -> None:
    folder = data_dir / "adapters"
    adapters = [open_adapter(folder / f"flan-t5-base-r16-{name}") for name in ("final", "step1000")]
    q = "encoder.block.0.layer.0.SelfAttention.q"
    parts = [(0.5, a.load(q)) for a in adapters]
    cut = truncate_many([stack(parts)], RankRule(rank=16))[0]
    assert cut.error / float(np.linalg.norm(dense(parts))) == pytest.approx(0.0019943, abs=5e-8)


def test_bfloat16_stays_bfloat16_and_one_adapter_is_unchanged(data_dir: Path, tmp_path: Path) -> None:
    adapter = open_adapter(data_dir / "adapters" / "opt125m-r16")
    assert output_dtype([adapter]) == torch.bfloat16
    untouched = ((m, adapter.load(m)) for m in adapter.modules)
    again = open_adapter(write_adapter(tmp_path / "out", untouched, [adapter], torch.bfloat16))
    for m in adapter.modules:
        # The scale 2 folds into B without rounding.
        assert torch.equal(again.load(m).delta(torch.float64), adapter.load(m).delta(torch.float64))
