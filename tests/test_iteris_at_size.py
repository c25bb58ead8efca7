"""The 8B-shaped run of `benchmarks/iteris_at_size.py` at a size of the CPU: the whole way, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import loraforge as lf
from benchmarks import iteris_at_size
from benchmarks.iteris_at_size import Account, Size, build_base, run
from loraforge.bench.peers.objective import iteris_objective

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SIZE = Size(
    layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocab=256, adapters=3, rank=4, samples=16, length=24
)
CPU = torch.device("cpu")
MODULES = SIZE.layers * len(SIZE.shapes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("size")
    names = list(iteris_at_size.RUNS)
    content = run(
        SIZE, device=CPU, dtype="float32", names=names, batch_tokens=128, out=folder / "out.json", keep=folder
    )
    return content, folder


def test_the_file_holds_what_was_returned(done: tuple[dict[str, Any], Path]) -> None:
    content, folder = done
    written = json.loads((folder / "out.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert written == json.loads(json.dumps(content))
    assert written["state"] == "done" and written["tokens"] == 3 * 16 * 24
    assert [r["name"] for r in written["runs"]] == ["iteris-plus", "iteris-plus-delta"]


def test_phases_and_parts_add_up(done: tuple[dict[str, Any], Path]) -> None:
    for row in done[0]["runs"]:
        assert {"load base", "load data", "load adapters", "trace", "sweep", "verify", "write", "reload"} <= set(
            row["phases"]
        )
        parts = {"forwards", "rows", "weights", "grams", "targets", "search", "solve", "residual", "cut", "checks"}
        assert set(row["parts"]) == parts
        walks = row["phases"]["sweep"] + row["phases"]["verify"]
        assert sum(row["parts"].values()) == pytest.approx(walks, rel=0.2), "parts exclude what lies inside them"
        known = sum(seconds for name, seconds in row["phases"].items() if name != "reload")
        assert 0.7 * row["seconds"] < known <= row["seconds"]
        assert row["verified"] == 0.0 and row["converged"] is True
        assert row["tokens per second"] == pytest.approx(SIZE.tokens / row["seconds"])


def test_operations_of_the_grams(done: tuple[dict[str, Any], Path]) -> None:
    """q, k and v share theirs, gate and up too: three inputs of one width and one of the other a layer."""
    squares = [SIZE.hidden] * 3 + [SIZE.intermediate]
    want = SIZE.layers * SIZE.tokens * sum(2 * d * (d + 1) + 2 * d * d for d in squares)
    row = done[0]["runs"][0]
    assert row["operations"]["grams"] == want
    assert row["gram tflops"] == pytest.approx(want / row["parts"]["grams"] / 1e12)


def test_merged_is_better_than_the_mean_in_every_kind(done: tuple[dict[str, Any], Path]) -> None:
    for row in done[0]["runs"]:
        assert set(row["residual"]) == set(iteris_at_size.TARGETS)
        for found in row["residual"].values():
            assert 0.0 < found["merged"] < found["plain mean of the adapters"] < 1.2


def test_better_than_the_weighted_average_by_another_measure(done: tuple[dict[str, Any], Path]) -> None:
    """The objective on the calibration data, computed by code that shares nothing with the engine."""
    folder = done[1]
    base = build_base(SIZE, CPU, torch.float32)
    paths = [folder / "adapters" / f"task{i}" for i in range(SIZE.adapters)]
    data = [lf_ids(folder / f"task{i}.safetensors") for i in range(SIZE.adapters)]
    batches = [[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] for ids in data]

    def deltas(path: Path) -> dict[str, torch.Tensor]:
        adapter = lf.open_adapter(path)
        return {name: adapter.load(name).delta(torch.float32) for name in adapter.modules}

    adapters = [deltas(path) for path in paths]
    average = {n: torch.stack([a[n] for a in adapters]).mean(0) for n in adapters[0]}
    merged = iteris_objective(base, adapters, batches, deltas(folder / "merged" / "iteris-plus-delta"))
    mean = iteris_objective(base, adapters, batches, average)
    assert merged < 0.98 * mean


def lf_ids(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)["input_ids"]


def test_peft_loads_the_merged_adapter(done: tuple[dict[str, Any], Path]) -> None:
    for name in iteris_at_size.RUNS:
        path = done[1] / "merged" / name
        base = build_base(SIZE, CPU, torch.float32)
        ids = torch.arange(SIZE.length)[None]
        plain = base(ids).logits
        model = PeftModel.from_pretrained(base, str(path))
        moved = model(ids).logits
        assert torch.isfinite(moved).all() and not torch.allclose(moved, plain, atol=1e-3)
        adapter = lf.open_adapter(path)
        assert len(adapter.modules) == MODULES
        with torch.no_grad():
            q = model.base_model.model.model.layers[1].self_attn.q_proj
            want = adapter.load("model.layers.1.self_attn.q_proj").delta(torch.float32)
            torch.testing.assert_close(q.get_delta_weight("default").float(), want, atol=1e-5, rtol=1e-3)


def test_a_run_that_is_cut_off_leaves_what_it_knew(tmp_path: Path) -> None:
    account = Account(tmp_path / "a.json", {"runs": []})
    account.write()
    account.content["runs"].append({"name": "x", "state": "running"})
    account.write(at_once=False)
    assert json.loads((tmp_path / "a.json").read_text()) == {"runs": []}, "not twice within two seconds"
    account.write()
    assert json.loads((tmp_path / "a.json").read_text())["runs"][0]["state"] == "running"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_threads_take_the_place_of_greenlets(done: tuple[dict[str, Any], Path], monkeypatch: Any) -> None:
    """The same result where the package is absent, as on a machine that nothing can be installed on."""
    import sys

    from loraforge.calibrate.carriers import ThreadCarrier, make_carrier

    monkeypatch.setitem(sys.modules, "greenlet", None)
    assert isinstance(make_carrier(lambda: None), ThreadCarrier)
    again = run(SIZE, device=CPU, dtype="float32", names=["iteris-plus"], batch_tokens=128, out=None)
    for field in ("residual", "alpha", "rho", "verified"):
        assert again["runs"][0][field] == done[0]["runs"][0][field]
