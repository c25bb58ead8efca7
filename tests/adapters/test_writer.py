from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from loraforge.adapters import AdapterWriter, HeadsPlan, PeftMeta, open_adapter, write_adapter
from loraforge.errors import LoraforgeError
from loraforge.storage.stream import TensorStream
from loraforge.types import LowRank

from .folders import simple

META = PeftMeta("tiny", "CAUSAL_LM", True)


def modules(
    ranks: dict[str, int], scaling: float = 1.0, dtype: torch.dtype = torch.float32
) -> list[tuple[str, LowRank]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            name,
            LowRank(
                *(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((6, r), (r, 5))), scaling
            ),
        )
        for name, r in ranks.items()
    ]


RANKS = {"b.v": 3, "a.q": 5, "a.qq": 5}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_configuration_has_scale_one_everywhere(tmp_path: Path) -> None:
    out = write_adapter(tmp_path / "out", modules(RANKS), META)
    found = json.loads((out / "adapter_config.json").read_text())
    assert found["r"] == found["lora_alpha"] == 5
    assert found["rank_pattern"] == found["alpha_pattern"] == {r"^b\.v": 3}
    assert found["target_modules"] == ["a.q", "a.qq", "b.v"]
    assert (found["bias"], found["use_rslora"], found["inference_mode"], found["lora_dropout"]) == (
        "none",
        False,
        True,
        0,
    )
    assert found["init_lora_weights"] is True and found["modules_to_save"] is None
    assert (found["base_model_name_or_path"], found["task_type"], found["fan_in_fan_out"]) == (
        "tiny",
        "CAUSAL_LM",
        True,
    )
    with safe_open(out / "adapter_model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_reads_back_with_scalings_folded(tmp_path: Path) -> None:
    given = modules(RANKS, scaling=-0.75)
    adapter = open_adapter(write_adapter(tmp_path / "out", iter(given), META))
    assert adapter.modules == ("a.q", "a.qq", "b.v")
    for name, lr in given:
        assert adapter.info(name).scaling == 1.0 and adapter.info(name).rank == RANKS[name]
        assert torch.allclose(adapter.load(name).delta(), lr.delta(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_reported(tmp_path: Path, dtype: torch.dtype) -> None:
    given = modules(RANKS, dtype=torch.float64)
    report = AdapterWriter(tmp_path / "out", META, dtype).write(given)
    adapter = open_adapter(report.path)
    worst = 0.0
    for name, lr in given:
        loaded = adapter.load(name)
        assert loaded.B.dtype == dtype
        for one, other in ((loaded.A, lr.A), (loaded.B, lr.B)):
            worst = max(worst, float((one.double() - other).norm() / other.norm()))
    assert report.rounding == pytest.approx(worst) and 0 < worst <= torch.finfo(dtype).eps
    assert report.rounding_module is not None and report.dtype == str(dtype).removeprefix("torch.")
    assert report.parameters == 11 * sum(RANKS.values()) and report.ranks == RANKS
    assert report.bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


def test_no_cast_no_rounding(tmp_path: Path) -> None:
    assert AdapterWriter(tmp_path / "out", META).write(modules(RANKS)).rounding == 0.0


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    big = [("a.q", LowRank(torch.full((6, 2), 1e5), torch.ones(2, 5)))]
    with pytest.raises(LoraforgeError, match="bfloat16 or float32") as caught:
        write_adapter(tmp_path / "out", big, META, torch.float16)
    assert "a.q.lora_B" in str(caught.value) and not list(tmp_path.iterdir())


def test_same_bytes_each_time_and_shared_memory(tmp_path: Path) -> None:
    shared = torch.randn(6, 8)
    given = [("a", LowRank(shared[:, ::2], torch.randn(5, 4).T)), ("b", LowRank(shared[:, ::2], torch.ones(4, 5)))]
    one, two = write_adapter(tmp_path / "one", given, META), write_adapter(tmp_path / "two", given, META)
    assert tree(one) == tree(two)
    assert torch.equal(open_adapter(one).load("a").B, shared[:, ::2])


def test_extra_files_and_their_paths(tmp_path: Path) -> None:
    extra = {"README.md": "text ä", "sub/x.bin": b"\x00", "run.json": lambda report: json.dumps(report.ranks)}
    out = write_adapter(tmp_path / "out", modules(RANKS), META, extra_files=extra)
    assert (out / "README.md").read_text(encoding="utf-8") == "text ä" and (out / "sub/x.bin").read_bytes() == b"\x00"
    assert json.loads((out / "run.json").read_text()) == RANKS
    for bad in ("../x", "/x", "a/../../x", "adapter_config.json", ""):
        with pytest.raises(LoraforgeError, match="extra file"):
            write_adapter(tmp_path / "bad", modules(RANKS), META, extra_files={bad: "x"})
        assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a..b", "a\x00b"])
def test_unsafe_module_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoraforgeError, match="module name"):
        write_adapter(tmp_path / "out", [(name, modules(RANKS)[0][1])], META)


def test_nothing_twice_or_empty(tmp_path: Path) -> None:
    one = modules(RANKS)[0]
    with pytest.raises(LoraforgeError, match="module name"):
        write_adapter(tmp_path / "out", [one, one], META)
    with pytest.raises(LoraforgeError, match="no module to write"):
        write_adapter(tmp_path / "out", [], META)
    with pytest.raises(LoraforgeError, match="rank 0"):
        write_adapter(tmp_path / "out", [("a", LowRank(torch.ones(6, 0), torch.ones(0, 5)))], META)
    assert not list(tmp_path.iterdir())


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    out = write_adapter(tmp_path / "out", modules(RANKS), META, extra_files={"old.txt": "old"})
    before = tree(out)
    with pytest.raises(LoraforgeError, match="exists already"):
        write_adapter(out, modules({"new": 2}), META)
    assert tree(out) == before
    write_adapter(out, modules({"new": 2}), META, overwrite=True)
    assert open_adapter(out).modules == ("new",) and not (out / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_own_outputs_are_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(LoraforgeError, match="holds something else"):
        write_adapter(precious, modules(RANKS), META, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraforgeError, match="is a file"):
        write_adapter(tmp_path / "file", modules(RANKS), META, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert open_adapter(write_adapter(tmp_path / "empty", modules(RANKS), META, overwrite=True)).modules


def test_inputs_are_never_replaced(tmp_path: Path) -> None:
    path = simple(tmp_path / "loras" / "a")
    before = tree(path)
    for out in (path, tmp_path / "loras"):
        with pytest.raises(LoraforgeError, match="replace an input"):
            write_adapter(out, modules(RANKS), [open_adapter(path)], overwrite=True)
    assert tree(path) == before


@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), LoraforgeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_midway_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, seen: type[BaseException], existing: bool
) -> None:
    out = tmp_path / "deep" / "er" / "out"
    if existing:
        write_adapter(out, modules(RANKS), META)
    before = tree(tmp_path)

    append = TensorStream.append

    def fail(self: TensorStream, key: str, tensor: Tensor) -> None:
        append(self, key, tensor)
        raise failure

    monkeypatch.setattr(TensorStream, "append", fail)
    with pytest.raises(seen) as caught:
        write_adapter(out, modules({"new": 2}), META, overwrite=existing)
    if isinstance(caught.value, LoraforgeError):
        assert "No space left" in str(caught.value) and str(out) in str(caught.value)
    assert tree(tmp_path) == before
    assert list(tmp_path.rglob("*.part*")) == []
    assert existing or not list(tmp_path.iterdir()), "parents made on the way are removed too"


def test_a_failing_source_leaves_no_trace(tmp_path: Path) -> None:
    def source() -> Iterator[tuple[str, LowRank]]:
        yield modules(RANKS)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "out", source(), META)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exchange", [True, False])
def test_failing_rename_keeps_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    from loraforge.storage import atomic

    out = write_adapter(tmp_path / "out", modules(RANKS), META)
    before = tree(tmp_path)
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    if not exchange:
        write_adapter(out, modules(RANKS), META, overwrite=True)  # the renames alone do it as well
        assert tree(tmp_path) == before
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(LoraforgeError, match="could not be written"):
        write_adapter(out, modules({"new": 2}), META, overwrite=True)
    assert tree(tmp_path) == before


def test_a_refusal_names_the_target_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        if self.name.endswith(".part"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(LoraforgeError, match="could not be written") as caught:
        write_adapter(tmp_path / "out", modules(RANKS), META)
    assert caught.value.where == str(tmp_path / "out") and caught.value.got == "No such file or directory"
    assert caught.value.hint == "choose another folder" and ".part" not in str(caught.value)


def test_a_full_disk_is_named_without_the_temporary_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: TensorStream, key: str, tensor: Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(TensorStream, "append", fail)
    with pytest.raises(LoraforgeError, match="No space left") as caught:
        write_adapter(tmp_path / "out", modules(RANKS), META)
    assert "free space" in str(caught.value) and ".part" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir(mode=0o500)
    with pytest.raises(LoraforgeError, match="could not be written"):
        write_adapter(tmp_path / "ro" / "out", modules(RANKS), META)


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoraforgeError, match="could not be written"):
        write_adapter(tmp_path / "file" / "out", modules(RANKS), META)


def test_output_through_a_link_and_with_usual_rights(tmp_path: Path) -> None:
    out = write_adapter(tmp_path / "real", modules(RANKS), META)
    (tmp_path / "link").symlink_to(out)
    write_adapter(tmp_path / "link", modules({"new": 2}), META, overwrite=True)
    assert (tmp_path / "link").is_symlink() and open_adapter(out).modules == ("new",)
    plain = tmp_path / "plain"
    plain.mkdir()
    assert out.stat().st_mode == plain.stat().st_mode
    config, weights = out / "adapter_config.json", out / "adapter_model.safetensors"
    assert config.stat().st_mode == weights.stat().st_mode


def test_heads_are_written_in_and_aside(tmp_path: Path) -> None:
    plan = HeadsPlan(
        merged={"score.weight": torch.ones(2, 5, dtype=torch.float16)},
        modules_to_save=("score",),
        aside={"x": {"classifier.weight": torch.arange(4.0)}},
    )
    out = write_adapter(tmp_path / "out", modules(RANKS), META, torch.bfloat16, plan)
    adapter = open_adapter(out)
    assert adapter.heads == ("score.weight",) and adapter.load_head("score.weight").dtype == torch.float16
    index = json.loads((out / "heads" / "x" / "heads.json").read_text())
    assert index["keys"] == {"classifier.weight": {"shape": [4], "dtype": "float32"}}
    with safe_open(out / "heads" / "x" / index["file"], "pt") as handle:
        assert torch.equal(handle.get_tensor("classifier.weight"), torch.arange(4.0))
