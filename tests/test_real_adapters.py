"""Every real adapter through the whole product: inspected, resized, converted, merged in sensible pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loraforge as lf
from loraforge.adapters import open_adapter, with_common_names
from loraforge.errors import LoraforgeError
from loraforge.merging.methods import METHODS

NAMES = (
    "bert-base-a32", "bert-base-sst2-a16", "dialogpt-synthetic-r8", "distilbert-emotion6", "distilbert-hate",
    "distilbert-imdb", "flan-t5-base-r16-final", "flan-t5-base-r16-step1000", "gpt2-cattn-a16", "gpt2-cattn-a8",
    "opt125m-r16", "own-minilm-emoint", "own-minilm-isear", "sd15-2100-diffusers", "sd15-2100-kohya-noalpha",
)  # fmt: skip
SAM = ("sam-vitb-rank2", "sam-vitb-rank4", "sam-vitb-rank8")
GROUPS = {
    "distilbert": ("distilbert-imdb", "distilbert-emotion6", "distilbert-hate"),
    "bert": ("bert-base-a32", "bert-base-sst2-a16"),
    "gpt2": ("gpt2-cattn-a8", "gpt2-cattn-a16"),
    "flan-t5": ("flan-t5-base-r16-final", "flan-t5-base-r16-step1000"),
    "minilm": ("own-minilm-emoint", "own-minilm-isear"),
    "sd15": ("sd15-2100-diffusers", "sd15-2100-kohya-noalpha"),
}
FEW = ("svd", "iso-c", "karcher", "knots-ties")


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> Path:
    return data_dir / "adapters"


def test_the_list_is_complete(folder: Path) -> None:
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*NAMES, *SAM}


@pytest.mark.parametrize("name", NAMES)
def test_inspected_resized_and_read_again(name: str, folder: Path, tmp_path: Path) -> None:
    adapter = open_adapter(folder / name)
    found = lf.inspect(folder / name)["adapters"][0]
    assert len(found["modules"]) == len(adapter.modules) > 0 and found["norm"] > 0
    assert json.dumps(found, allow_nan=False)
    report = lf.resize(folder / name, tmp_path / "small", rank=2)
    adapter, small = with_common_names([adapter, open_adapter(tmp_path / "small")])
    assert set(small.modules) == set(adapter.modules) and {small.info(m).rank for m in small.modules} == {2}
    exact = {m: adapter.load(m).delta(torch.float64) for m in adapter.modules[:2]}
    for module, delta in exact.items():
        spectrum = torch.linalg.svdvals(delta)
        away = float((small.load(module).delta(torch.float64) - delta).norm())
        # Written in the adapter's own dtype: half precision adds its rounding to the optimum of rank 2.
        rounding = float(delta.norm()) * (8e-3 if adapter.info(module).dtype != torch.float32 else 2e-6)
        assert away <= float(spectrum[2:].norm()) + rounding
    assert 0.0 <= report["relative_error"] < 1.0


@pytest.mark.parametrize("name", NAMES)
def test_converted_there_and_back(name: str, folder: Path, tmp_path: Path) -> None:
    """Where a format has a word for it, the bits come back; what cannot be expressed is refused by name."""
    source = open_adapter(folder / name)
    for to in ("kohya", "diffusers", "peft"):
        out = tmp_path / to
        try:
            lf.convert(folder / name, out, to=to)
        except LoraforgeError as error:
            assert not out.exists() and "next:" in str(error)
            continue
        one, two = with_common_names([source, open_adapter(out)])
        assert set(one.modules) == set(two.modules)
        for module in one.modules[:3]:
            assert torch.equal(one.load(module).delta(torch.float32), two.load(module).delta(torch.float32)), (
                to,
                module,
            )


def test_the_pair_of_formats_becomes_each_other(folder: Path, tmp_path: Path) -> None:
    """All 256 tensors bit for bit, whichever way."""
    files = {"diffusers": folder / "sd15-2100-diffusers", "kohya": folder / "sd15-2100-kohya-noalpha"}
    for to, source in (("kohya", "diffusers"), ("diffusers", "kohya")):
        lf.convert(files[source], tmp_path / to, to=to)
        ours, theirs = with_common_names([open_adapter(tmp_path / to), open_adapter(files[to])])
        assert ours.format == theirs.format == to and len(theirs.modules) == 128
        assert set(ours.modules) == set(theirs.modules)
        for module in theirs.modules:
            one, two = ours.load(module), theirs.load(module)
            assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B) and one.scaling == two.scaling


@pytest.mark.parametrize("name", SAM)
def test_sam_is_refused_with_the_way_out(name: str, folder: Path) -> None:
    with pytest.raises(LoraforgeError, match="Sam_LoRA") as caught:
        open_adapter(folder / name)
    assert "w_a_000" in str(caught.value) and "key map" in str(caught.value)


def merged(paths: list[Path], method: str, out: Path) -> dict[str, Any]:
    report = lf.merge(paths, method=method, out=out, force=True).report
    adapter, first = with_common_names([open_adapter(out), open_adapter(paths[0])])
    assert set(adapter.modules) == set(first.modules)
    for module in adapter.modules:
        pair = adapter.load(module)
        assert adapter.info(module).scaling == 1.0
        assert bool(torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all())
    return report


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("group", GROUPS)
def test_groups_merge(group: str, method: str, folder: Path, tmp_path: Path) -> None:
    report = merged([folder / name for name in GROUPS[group]], method, tmp_path / "out")
    assert report["modules"] > 0 and 0.0 < report["kept_energy"] <= 1.0


@pytest.mark.parametrize(
    "method", [name for name, row in METHODS.items() if row.needs == "adapters" and name not in FEW]
)
def test_every_method_merges_a_real_pair(method: str, folder: Path, tmp_path: Path) -> None:
    report = merged([folder / name for name in GROUPS["minilm"]], method, tmp_path / "out")
    assert report["method"] == method and report["rank_max"] >= 1


def test_adapters_of_two_bases_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="problems|base models|shapes"):
        lf.merge([folder / "gpt2-cattn-a8", folder / "opt125m-r16"], method="svd", out=tmp_path / "out")
    assert not any(tmp_path.iterdir())
