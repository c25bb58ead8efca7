"""Module by module: what an interrupted run wrote is kept, and the result has the bytes of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from loraforge.adapters import AdapterWriter, HeadsPlan, PeftMeta, all_modules, open_adapter, with_common_names
from loraforge.adapters.layouts import Shape
from loraforge.errors import LoraforgeError, UsageError
from loraforge.types import LowRank

META = PeftMeta("tiny", "CAUSAL_LM")
NAMES = [f"layers.{i}.q" for i in range(6)]
PRINT = {"method": "svd", "seed": 1}


def update(i: int, rank: int = 2, scaling: float = 0.5) -> LowRank:
    generator = torch.Generator().manual_seed(i)
    B, A = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((7, rank), (rank, 5)))
    return LowRank(B, A, scaling)


def writer(out: Path, **options: Any) -> AdapterWriter:
    known: dict[str, Any] = {"dtype": torch.bfloat16, "extra_files": {"README.md": lambda report: str(report.rows)}}
    return AdapterWriter(out, META, resume=True, fingerprint=PRINT, **(known | options))


def run(out: Path, stop: int | None = None, **options: Any) -> Any:
    """Adds what is not there yet; interrupted behind module `stop`."""
    with writer(out, **options).session(NAMES) as session:
        for i, name in enumerate(NAMES):
            if name not in session.finished:
                session.add(name, update(i, rank=1 + i % 3), {"module": name, "error": 1.0 / (i + 3)})
            if i == stop:
                raise KeyboardInterrupt
    return session


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("stop", range(len(NAMES)))
def test_a_continued_run_gives_the_same_bytes_and_report(tmp_path: Path, stop: int) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop)
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole", ".out.part"}
    continued = run(tmp_path / "out")
    assert list(continued.finished) == NAMES[: stop + 1] and whole.finished == {}
    assert continued.finished == {name: whole.report.rows[name] for name in NAMES[: stop + 1]}
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    one, other = whole.report, continued.report
    assert (one.ranks, one.rows, one.parameters, one.bytes) == (other.ranks, other.rows, other.parameters, other.bytes)
    assert (one.rounding, one.rounding_module) == (other.rounding, other.rounding_module) and one.rounding > 0


def test_what_came_behind_the_tensors_is_written_anew(tmp_path: Path) -> None:
    def interrupt(report: object) -> str:
        raise KeyboardInterrupt

    heads = HeadsPlan(merged={"score.weight": torch.ones(2, 5)}, aside={"x": {"classifier.weight": torch.ones(3)}})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", heads=heads, extra_files={"a/b.txt": "text", "README.md": interrupt})
    run(tmp_path / "out", heads=heads)
    run(tmp_path / "whole", heads=heads)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", 2)
    with (
        pytest.raises(LoraforgeError, match="another one"),
        AdapterWriter(tmp_path / "out", META, torch.bfloat16, resume=True, fingerprint={**PRINT, "seed": 2}).session(
            NAMES
        ),
    ):
        raise AssertionError("not reached")
    with pytest.raises(LoraforgeError, match="rank 0"):  # any other failure ends it
        with writer(tmp_path / "out").session(NAMES) as session:
            session.add(NAMES[-1], LowRank(torch.ones(7, 0), torch.ones(0, 5)))
    assert not list(tmp_path.iterdir())


def test_a_session_takes_each_announced_module_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not announced"), writer(tmp_path / "out").session(["a"]) as session:
        session.add("b", update(1))
    with pytest.raises(ValueError, match="written already"), writer(tmp_path / "out").session(["a"]) as session:
        session.add("a", update(1))
        session.add("a", update(1))
    with pytest.raises(ValueError, match="'b' first"), writer(tmp_path / "out").session(["a", "b"]) as session:
        session.add("a", update(1))
    with (
        pytest.raises(ValueError, match="bias that was not announced"),
        writer(tmp_path / "out").session(["a"]) as session,
    ):
        session.add("a", update(1), bias=torch.ones(7))
    assert not list(tmp_path.iterdir())


def test_the_order_of_adding_is_free(tmp_path: Path) -> None:
    with writer(tmp_path / "out").session(["a", "b"]) as session:
        session.add("b", update(1))
        session.add("a", update(2))
    assert list(session.report.ranks) == ["b", "a"] and open_adapter(tmp_path / "out").modules == ("a", "b")


UNET = "unet.down_blocks.0.attn1.to_out.0"


def test_kohya_is_one_file_with_alpha_and_metadata(tmp_path: Path) -> None:
    given = [(UNET, update(1)), ("text_encoder.text_model.encoder.layers.0.mlp.fc1", update(2, 3))]
    metadata = {"ss_base_model_version": "sd_v1", "sshs_model_hash": "00"}
    meta = PeftMeta(parted=frozenset(name for name, _ in given), metadata=metadata)
    report = AdapterWriter(tmp_path / "my lora", meta, torch.float16, format="kohya").write(given)
    assert {entry.name for entry in (tmp_path / "my lora").iterdir()} == {"my lora.safetensors"}
    with safe_open(tmp_path / "my lora" / "my lora.safetensors", "pt") as handle:
        assert handle.metadata() == {
            "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "Dynamic",
            "ss_network_alpha": "Dynamic", "ss_base_model_version": "sd_v1",
        }  # fmt: skip
        name, other = "lora_unet_down_blocks_0_attn1_to_out_0", "lora_te_text_model_encoder_layers_0_mlp_fc1"
        assert set(handle.keys()) == {
            f"{stem}.{end}" for stem in (name, other) for end in ("lora_down.weight", "lora_up.weight", "alpha")
        }
        alpha = handle.get_tensor(f"{other}.alpha")
        assert alpha.dtype == torch.float16 and alpha.shape == () and alpha.item() == 3
    found = open_adapter(report.path)
    assert {found.info(module).scaling for module in found.modules} == {1.0}
    assert torch.allclose(found.load(name).delta(torch.float64), given[0][1].delta(), atol=5e-3)


def test_diffusers_is_one_file(tmp_path: Path) -> None:
    report = AdapterWriter(tmp_path / "out", PeftMeta(parted=frozenset({UNET})), format="diffusers").write(
        [(UNET, update(1))]
    )
    with safe_open(report.path / "pytorch_lora_weights.safetensors", "pt") as handle:
        assert set(handle.keys()) == {f"{UNET}.lora.down.weight", f"{UNET}.lora.up.weight"}
    assert torch.allclose(open_adapter(report.path).load(UNET).delta(torch.float64), update(1).delta(), atol=1e-6)


@pytest.mark.parametrize("format", ["peft", "kohya"])
@pytest.mark.parametrize("scaling", [2.0, 1 / 3, 11.3137 / 7, 1e-9])
def test_kept_scales_leave_the_bits_alone(tmp_path: Path, format: str, scaling: float) -> None:
    given = LowRank(torch.randn(7, 7).bfloat16(), torch.randn(7, 5), scaling)
    plain = LowRank(torch.randn(7, 2), torch.randn(2, 5), 1.0)
    written = AdapterWriter(tmp_path / "out", META, None, format=format, keep_scales=True).write(
        [("a.q", given), ("a.v", plain)]
    )
    found = open_adapter(written.path)
    for name, pair in zip(found.modules, (given, plain), strict=True):
        loaded = found.load(name)
        assert loaded.scaling == pytest.approx(pair.scaling, rel=1e-15)
        assert loaded.A.dtype == pair.A.dtype and torch.equal(loaded.A, pair.A)
        assert loaded.B.dtype == pair.B.dtype and torch.equal(loaded.B, pair.B)
    assert written.rounding == 0.0


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="output format"):
        AdapterWriter(tmp_path / "out", META, format="onnx").write([("a", update(1))])


def test_a_scale_of_zero_is_not_lost(tmp_path: Path) -> None:
    """Readers of kohya files take an alpha of 0 for none, which would be scale 1."""
    given = LowRank(torch.ones(7, 2), torch.ones(2, 5), 0.0)
    report = AdapterWriter(tmp_path / "out", META, None, format="kohya", keep_scales=True).write([("a.q", given)])
    found = open_adapter(report.path)
    assert not found.load(found.modules[0]).delta().any()


def test_a_bias_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    meta = PeftMeta(shapes={"a": Shape(m=7, n=5, rank=2, biased=True)})
    with pytest.raises(LoraforgeError, match="not finite in the dtype") as caught:
        AdapterWriter(tmp_path / "out", meta, torch.float16).write([("a", update(1))], {"a": torch.full((7,), 1e6)})
    assert caught.value.where == "a.lora_B.bias"


def test_names_are_spelled_as_in_the_first_adapter(tmp_path: Path) -> None:
    """`unet.` is a part of a pipeline in a diffusers file, `transformer.` is none in a PEFT adapter."""
    given = [("mid_block.resnets.0.conv1", update(1)), ("mid_block.resnets.0.conv2", update(2))]
    plain = AdapterWriter(tmp_path / "p", META).write(given).path
    parted = AdapterWriter(tmp_path / "d", META, format="diffusers").write(given[:1]).path
    adapters = with_common_names([open_adapter(parted), open_adapter(plain)])
    assert set(all_modules(adapters)) == {"unet.mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"}
    pairs = [(name, update(3)) for name in all_modules(adapters)]
    out = AdapterWriter(tmp_path / "out", adapters).write(pairs).path
    assert open_adapter(out).modules == tuple(name for name, _ in given)
    language = [("transformer.h.0.attn.c_attn", update(1))]
    one = open_adapter(AdapterWriter(tmp_path / "gpt2", META).write(language).path)
    flat = open_adapter(AdapterWriter(tmp_path / "kohya", META, format="kohya").write(language).path)
    adapters = with_common_names([one, flat])
    out = AdapterWriter(tmp_path / "both", adapters).write(language).path
    assert open_adapter(out).modules == ("transformer.h.0.attn.c_attn",)
