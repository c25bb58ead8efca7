"""`collect_stats`: what is written, resumed, dealt out in parts, and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loraforge
from loraforge.errors import LoraforgeError, UsageError
from loraforge.input_stats import collect_stats, load_stats, merge_stats
from loraforge.input_stats.collect import parse_part
from loraforge.input_stats.run import unfinished_path
from tests.adapters.folders import simple

from .models import write_base, write_data

BATCHES = {"batch_tokens": 20, "dtype": "float64"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "d.safetensors")


def test_a_file_says_what_it_was_made_of(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sub" / "s.safetensors"
    found = collect_stats(base, data, out, targets="q_proj,down_proj", **BATCHES)
    json.dumps(found, allow_nan=False)
    stats = load_stats(out)
    names = [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("self_attn.q_proj", "mlp.down_proj")]
    assert list(stats) == sorted(names, key=list(stats).index) and {tuple(v.shape) for v in stats.values()} == {
        (16,),
        (24,),
    }
    assert found["modules"] == 4 and found["kind"] == "diag" and found["samples"] == 12 and found["skipped"] == {}
    with safe_open(out, framework="pt") as file:
        about = json.loads(file.metadata()["loraforge.input_stats"])
    assert about["tokens"] == dict.fromkeys(names, found["tokens"]["most"])
    assert about["sources"][0]["name"] == str(data) and len(about["sources"][0]["sha256"]) == 64
    assert {"loraforge", "python", "torch", "transformers"} == about["versions"].keys()
    assert sorted(os.listdir(out.parent)) == ["s.safetensors"]


def test_the_same_command_gives_the_same_bytes(base: Path, data: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for out in files:
        collect_stats(base, data, out, targets="q_proj", **BATCHES)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_several_files_count_as_one_set(base: Path, tmp_path: Path) -> None:
    halves = [write_data(tmp_path / f"{i}.safetensors", seed=i) for i in (1, 2)]
    joined = {key: torch.cat([load_file(p)[key] for p in halves]) for key in load_file(halves[0])}
    save_file(joined, tmp_path / "all.safetensors")
    collect_stats(base, halves, tmp_path / "two.safetensors", **BATCHES)
    collect_stats(base, tmp_path / "all.safetensors", tmp_path / "one.safetensors", **BATCHES)
    one, two = load_stats(tmp_path / "one.safetensors"), load_stats(tmp_path / "two.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-12)


def test_modules_of_an_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    adapter = simple(tmp_path / "a", modules={"model.layers.1.self_attn.q_proj": (16, 4, 16)})
    found = collect_stats(base, data, tmp_path / "s.safetensors", adapter=adapter, **BATCHES)
    assert found["modules"] == 1 and list(load_stats(tmp_path / "s.safetensors")) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("kind", ["diag", "gram"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_parts_join_to_what_one_process_gives(base: Path, data: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    how: dict[str, Any] = {"kind": kind, "batch_tokens": 20, "dtype": dtype, "targets": "q_proj,down_proj"}
    whole = collect_stats(base, data, tmp_path / "one.safetensors", **how)
    parts = [tmp_path / f"p{i}.safetensors" for i in (1, 2, 3)]
    for i, out in enumerate(parts, 1):
        collect_stats(base, data, out, part=f"{i}/3", **how)
    joined = merge_stats([parts[2], parts[0], parts[1]], tmp_path / "joined.safetensors")
    assert {k: joined[k] for k in ("samples", "batches", "tokens")} == {
        k: whole[k] for k in ("samples", "batches", "tokens")
    }
    one, two = load_stats(tmp_path / "one.safetensors"), load_stats(tmp_path / "joined.safetensors")
    for name, value in one.items():
        # Every forward is the same, so that only the order of float64 sums differs.
        torch.testing.assert_close(two[name], value, rtol=1e-12, atol=1e-14)


KILLED = """
import os, signal, sys
import loraforge.input_stats.run as run
from loraforge.input_stats import collect_stats
run.SAVE_SECONDS = 0.0
run.SAVE_SHARE = 1e9
def progress(stage, detail, done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
collect_stats(sys.argv[1], sys.argv[2], sys.argv[3], kind="gram", targets="q_proj,k_proj", batch_tokens=20,
              resume=True, progress=progress)
"""


def test_a_killed_run_goes_on_with_its_last_batch(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(base), str(data), str(out)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert unfinished_path(out).is_file() and not out.exists()
    how: dict[str, Any] = {"kind": "gram", "targets": "q_proj,k_proj", "batch_tokens": 20}
    with pytest.raises(LoraforgeError, match="interrupted run") as caught:
        collect_stats(base, data, out, **how)
    assert "--resume" in str(caught.value.hint)
    with pytest.raises(LoraforgeError, match="another command") as caught:
        collect_stats(base, data, out, resume=True, kind="gram", targets="q_proj", batch_tokens=20)
    assert caught.value.got == "another modules"
    seen: list[int] = []
    found = collect_stats(base, data, out, resume=True, progress=lambda *step: seen.append(step[2]), **how)
    assert found["resumed_from"] == 2 and seen[0] == 3
    collect_stats(base, data, tmp_path / "straight.safetensors", **how)
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["s.safetensors", "straight.safetensors"]
    # A finished run that is resumed has nothing to do.
    again = collect_stats(base, data, out, resume=True, progress=lambda *step: pytest.fail("ran"), **how)
    assert again["tokens"] == found["tokens"]


def test_overwrite_starts_anew_and_replaces_statistics_only(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    collect_stats(base, data, out, targets="q_proj", **BATCHES)
    with pytest.raises(LoraforgeError, match="exists already"):
        collect_stats(base, data, out, targets="k_proj", **BATCHES)
    unfinished_path(out).write_bytes(out.read_bytes())
    collect_stats(base, data, out, targets="k_proj", overwrite=True, **BATCHES)
    assert "model.layers.0.self_attn.k_proj" in load_stats(out) and not unfinished_path(out).exists()
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(LoraforgeError):
        collect_stats(base, data, tmp_path / "weights.safetensors", overwrite=True)


def test_refused_data_leave_nothing_behind(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.calibrate.models import make

    monkeypatch.setattr("loraforge.input_stats.run.SAVE_SECONDS", 0.0)
    model = make("llama").model
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(float("nan"))
    with pytest.raises(LoraforgeError, match="NaN or Inf"):
        collect_stats(model, data, tmp_path / "s.safetensors", **BATCHES)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_asked_for(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    with pytest.raises(UsageError, match="unknown kind"):
        collect_stats(base, data, out, kind="diagonal")
    with pytest.raises(UsageError, match="both name"):
        collect_stats(base, data, out, targets="q_proj", adapter="a")
    with pytest.raises(UsageError, match="safetensors file"):
        collect_stats(base, data, tmp_path / "s.pt")
    with pytest.raises(UsageError, match="unknown device"):
        collect_stats(base, data, out, device="tpu9x")
    with pytest.raises(LoraforgeError, match="part has no batch"):
        collect_stats(base, data, out, part=(9, 9), batch_tokens=10**6)
    with pytest.raises(LoraforgeError, match="no data"):
        collect_stats(base, [], out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "-1/2", (0, 1), "1/2/3"])
def test_parts_out_of_range(part: Any) -> None:
    with pytest.raises(UsageError, match="part is out of range"):
        parse_part(part)


def test_a_decoder_without_inputs_is_named(tmp_path: Path) -> None:
    t5 = write_base(tmp_path / "t5", "t5")
    with pytest.raises(LoraforgeError, match="decoder reads"):
        collect_stats(t5, write_data(tmp_path / "d.safetensors"), tmp_path / "s.safetensors")
    found = collect_stats(
        t5, write_data(tmp_path / "e.safetensors", family="t5"), tmp_path / "s.safetensors", **BATCHES
    )
    assert found["modules"] == 33 and found["tokens"]["fewest"] < found["tokens"]["most"]


def test_is_public() -> None:
    assert loraforge.collect_stats is collect_stats and loraforge.load_stats is load_stats
    assert loraforge.merge_stats is merge_stats


def test_a_real_model_and_real_text(data_dir: Path, tmp_path: Path) -> None:
    """A trained Llama reads its own kind of tokens; features of real activations are far from equally strong."""
    base = data_dir / "models" / "stories260K-llama-hf"
    if not base.is_dir():
        pytest.skip(f"no model at {base}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (64, 48), generator=generator)
    mask = (torch.arange(48) < torch.randint(8, 49, (64, 1), generator=generator)).to(torch.int64)
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "d.safetensors")
    found = collect_stats(base, tmp_path / "d.safetensors", tmp_path / "s.safetensors", batch_tokens=512)
    stats = load_stats(tmp_path / "s.safetensors")
    assert found["tokens"]["most"] == int(mask.sum()) and len(stats) == found["modules"] > 30
    spread = [float(v.max() / v.mean()) for v in stats.values()]
    assert max(spread) > 3.0 and all(bool((v >= 0).all()) for v in stats.values())
