"""The stream of merged modules: windows, rank rules, flattening, writing module by module, continuing after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import loraforge as lf
from loraforge.adapters import open_adapter
from loraforge.errors import LoraforgeError, UsageError
from loraforge.merging import stream
from loraforge.merging.checks import draw_keys
from loraforge.merging.methods import METHODS
from tests.adapters import folders

SHAPES = {f"layers.{i}.{kind}": shape for i in range(4) for kind, shape in (("q", (24, 3, 20)), ("o", (20, 3, 24)))}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    settings = folders.config(r=3, lora_alpha=6, target_modules=["q", "o"], task_type=None)
    return [folders.write_folder(tmp_path / f"a{i}", folders.factors(SHAPES, seed=i), settings) for i in range(2)]


def deltas(result: Any) -> dict[str, torch.Tensor]:
    return {name: result.modules[name].delta(torch.float64) for name in result.modules}


def away(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b)


@pytest.mark.parametrize("method", ["svd", "ties", "iso-cts", "rsvd", "concat"])
def test_windows_and_threads_change_nothing(method: str, two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lf.merge(two, method=method)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 1)
    one_by_one = lf.merge(two, method=method)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threaded = lf.merge(two, method=method)
    finally:
        torch.set_num_threads(before)
    assert away(deltas(one_by_one), deltas(whole)) < 1e-6
    assert away(deltas(threaded), deltas(one_by_one)) < 1e-12


@pytest.mark.parametrize("method", ["svd", "ties", "iso-c", "tsv", "concat"])
def test_what_is_written_is_what_memory_holds(method: str, two: list[Path], tmp_path: Path) -> None:
    held = lf.merge(two, method=method)
    streamed = lf.merge(two, method=method, out=tmp_path / "streamed")
    saved = held.save(tmp_path / "saved")
    assert (saved / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "streamed" / "adapter_model.safetensors"
    ).read_bytes()
    assert away(deltas(streamed), deltas(held)) < 1e-6
    reports = [json.loads((tmp_path / n / "run.json").read_text()) for n in ("saved", "streamed")]
    changing = {"out", "seconds", "phases", "peak_rss_bytes", "kernels"}
    assert {k: v for k, v in reports[0].items() if k not in changing} == {
        k: v for k, v in reports[1].items() if k not in changing
    }
    with pytest.raises(LoraforgeError, match="on disk already"):
        streamed.save(tmp_path / "again")


def test_post_iso_flattens_any_method_after_the_cut(two: list[Path]) -> None:
    plain = lf.merge(two, method="svd", rank=2)
    flat = lf.merge(two, method="svd", rank=2, post="iso")
    for name, pair in plain.modules.items():
        before, after = (
            torch.linalg.svdvals(pair.delta(torch.float64)),
            torch.linalg.svdvals(flat.modules[name].delta(torch.float64)),
        )
        assert torch.allclose(after[:2], before[:2].mean().expand(2), rtol=1e-5)
        assert float(after[2]) < 1e-5 * float(after[0])
    assert flat.report["post"]["mean_over"] == "support"
    same = lf.merge(two, method="task-arithmetic", post="iso")
    assert away(deltas(same), deltas(lf.merge(two, method="iso-c"))) < 1e-12


def test_a_budget_is_dealt_out_by_worth(two: list[Path]) -> None:
    """The module with the larger delta gets the higher rank."""
    loud = dict(folders.factors(SHAPES, seed=5))
    for key in loud:
        if "layers.0.q.lora_B" in key:
            loud[key] *= 100.0
    settings = folders.config(r=3, lora_alpha=3, target_modules=["q", "o"], task_type=None)
    path = folders.write_folder(two[0].parent / "loud", loud, settings)
    found = lf.merge([path], method="concat", budget=8 * 44 + 2 * 44)
    ranks = {name: pair.rank for name, pair in found.modules.items()}
    assert ranks["layers.0.q"] == 3 and sum(ranks.values()) == 10


def test_draw_keys_do_not_depend_on_order_or_parents() -> None:
    assert draw_keys([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert draw_keys([Path("/x/b"), Path("/x/a")]) == ["b", "a"]
    assert draw_keys([Path("/x/a/ad"), Path("/x/b/ad")]) == ["a/ad", "b/ad"]
    assert draw_keys([Path("/x/a"), Path("/x/a"), Path("/x/a")]) == ["a", "a-2", "a-3"]


SCRIPT = """
import sys, time
import loraforge as lf
from loraforge.merging import stream
stream.WINDOW_BYTES = 1
slow = float(sys.argv[4])
lf.merge([sys.argv[1], sys.argv[2]], method={method!r}, out=sys.argv[3], resume=sys.argv[5] == "resume",
         progress=lambda *_: time.sleep(slow))
"""


def run(paths: list[Path], out: Path, slow: float, resume: bool, method: str = "svd") -> subprocess.Popen[bytes]:
    words = [str(paths[0]), str(paths[1]), str(out), str(slow), "resume" if resume else "no"]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(method=method), *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def wait_for_work(out: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the unfinished output holds a few modules."""
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if sum(f.stat().st_size for f in out.parent.glob(f".{out.name}*/*") if f.is_file()) > 4000:
            return
        time.sleep(0.02)
    raise AssertionError(f"no work was seen: {process.stderr.read() if process.poll() is not None else 'slow'!r}")  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["svd", "dare-ties"])
def test_a_killed_merge_leaves_nothing_to_read_and_is_continued(method: str, two: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    out = folder / "merged"
    process = run(two, out, slow=0.15, resume=True, method=method)
    wait_for_work(out, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists() and all(entry.name.startswith(".") for entry in folder.iterdir())
    continued = lf.merge(two, method=method, out=out, resume=True)
    assert any("continued an interrupted run" in w for w in continued.report["warnings"])
    whole = lf.merge(two, method=method).save(tmp_path / "whole")
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert [entry.name for entry in folder.iterdir()] == ["merged"]
    layers = json.loads((out / "run.json").read_text())["layers"]
    assert [layer["module"] for layer in layers] == sorted(SHAPES, key=lambda n: (int(n.split(".")[1]), n))


def test_another_merge_does_not_continue_it(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    process = run(two, out, slow=0.15, resume=True)
    wait_for_work(out, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(LoraforgeError) as caught:
        lf.merge(two, method="svd", rank=1, out=out, resume=True)
    assert "rank_rule" in str(caught.value) and "without" in str(caught.value)
    lf.merge(two, method="svd", rank=1, out=out)
    assert open_adapter(out).info("layers.0.q").rank == 1
    assert not list(tmp_path.glob(".merged*"))


def test_options_that_contradict_a_method(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reads no input statistics"):
        lf.merge(two, method="svd", stats=["x.safetensors", "y.safetensors"])
    with pytest.raises(UsageError, match="rank rule of its own"):
        lf.merge(two, method="svd", rank=2, budget=1000)
    with pytest.raises(LoraforgeError, match="base plus the merged update"):
        lf.merge(two, method="svd", output_kind="model", out=tmp_path / "model")
    with pytest.raises(UsageError, match="uses no base model"):
        lf.merge(two, method="svd", base="somewhere")
    with pytest.raises(LoraforgeError, match="this number of adapters"):
        lf.merge([*two, *two], method="slerp")


@pytest.mark.parametrize("name", [n for n, row in METHODS.items() if row.needs == "adapters"])
def test_peak_memory_does_not_grow_with_the_modules(
    name: str, two: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more modules are alive at a time than a window holds: loaded factors die before the next window is read."""
    import weakref

    from loraforge.adapters import Adapter

    monkeypatch.setattr(stream, "WINDOW_BYTES", 1)
    alive: list[weakref.ref[Any]] = []
    most = 0
    original = Adapter.load

    def load(self: Adapter, module: str) -> Any:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        found = original(self, module)
        alive.append(weakref.ref(found.A))
        return found

    monkeypatch.setattr(Adapter, "load", load)
    lf.merge(two, method=name, out=two[0].parent / "out")
    assert len(alive) >= 2 * len(SHAPES) and most <= 4, os.linesep.join(map(str, (most, len(alive))))
