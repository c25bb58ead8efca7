from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraforge.adapters import open_adapter
from loraforge.errors import InputProblems, LoraforgeError

from .folders import MODULES, PREFIX, config, factors, simple, write_folder


def refused(path: Path) -> str:
    with pytest.raises(LoraforgeError) as caught:
        open_adapter(path)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_reads_names_shapes_and_factors(tmp_path: Path) -> None:
    adapter = open_adapter(simple(tmp_path / "a"))
    assert adapter.modules == ("layers.2.q", "layers.10.q"), "naturally sorted"
    assert (adapter.name, adapter.base, adapter.task_type, adapter.heads) == ("a", "tiny", "CAUSAL_LM", ())
    info = adapter.info("layers.2.q")
    assert (info.rank, info.scaling, info.m, info.n) == (4, 2.0, 6, 5)
    assert info.dtype == torch.float32 and not info.fan_in_fan_out
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    loaded = adapter.load("layers.10.q")
    assert torch.equal(loaded.B, stored[f"{PREFIX}layers.10.q.lora_B.weight"])
    assert torch.equal(loaded.A, stored[f"{PREFIX}layers.10.q.lora_A.weight"]) and loaded.scaling == 2.0
    content = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    assert adapter.sha256 == hashlib.sha256(content).hexdigest() and adapter.bytes == len(content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_dtypes_and_both_kinds_of_file(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    tensors = factors(MODULES, dtype=dtype)
    adapter = open_adapter(write_folder(tmp_path / "a", tensors, config(), kind))
    loaded = adapter.load("layers.2.q")
    assert loaded.B.dtype == adapter.info("layers.2.q").dtype == dtype
    assert torch.equal(loaded.B, tensors[f"{PREFIX}layers.2.q.lora_B.weight"])


def test_scaling_follows_patterns_as_peft_does(tmp_path: Path) -> None:
    from peft.utils.other import get_pattern_key

    names = {"a.q": 4, "b.a.q": 4, "b.k": 2, "c.k": 2, "v": 8, "wv": 4}
    settings = config(
        lora_alpha=12, rank_pattern={"k": 2, "^v": 8}, alpha_pattern={"a.q": 6, "q": 100, r"[bc]\.k": 10, "^wv$": 3}
    )
    tensors = factors({name: (6, rank, 5) for name, rank in names.items()})
    adapter = open_adapter(write_folder(tmp_path / "a", tensors, settings))
    for name, rank in names.items():
        alpha = settings["alpha_pattern"].get(get_pattern_key(settings["alpha_pattern"], name), 12)
        assert adapter.info(name).scaling == pytest.approx(alpha / rank), name
    assert adapter.info("b.a.q").scaling == 1.5 and adapter.info("wv").scaling == 0.75


def test_rslora_scale(tmp_path: Path) -> None:
    adapter = open_adapter(simple(tmp_path / "a", use_rslora=True, lora_alpha=3))
    assert adapter.info("layers.2.q").scaling == pytest.approx(1.5)


def test_conv1d_needs_no_transposition(tmp_path: Path) -> None:
    adapter = open_adapter(simple(tmp_path / "a", fan_in_fan_out=True))
    info = adapter.info("layers.2.q")
    assert info.fan_in_fan_out and adapter.load("layers.2.q").shape == (6, 5)


def test_tensors_are_loaded_when_asked_for(tmp_path: Path) -> None:
    path = simple(tmp_path / "a")
    adapter = open_adapter(path)
    tensors = load_file(path / "adapter_model.safetensors")
    assert torch.equal(adapter.load("layers.2.q").A, tensors[f"{PREFIX}layers.2.q.lora_A.weight"])
    save_file({key: value + 1 for key, value in tensors.items()}, path / "adapter_model.safetensors")
    with pytest.raises(LoraforgeError, match="changed meanwhile"):
        adapter.load("layers.2.q")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(LoraforgeError, match="damaged"):
        adapter.load("layers.2.q")


def test_heads_and_extras(tmp_path: Path) -> None:
    extra = {
        "score.weight": torch.ones(2, 5),
        "pre_classifier.dense.bias": torch.ones(5),
        "layers.2.q.base_layer.bias": torch.ones(6),
        "emb.token_adapter.trainable_tokens_delta": torch.ones(2, 5),
    }
    path = simple(tmp_path / "a", extra=extra, task_type="SEQ_CLS", modules_to_save=None)
    adapter = open_adapter(path)
    assert adapter.heads == ("pre_classifier.dense.bias", "score.weight")
    assert adapter.extras == ("emb.token_adapter.trainable_tokens_delta", "layers.2.q.base_layer.bias")
    assert torch.equal(adapter.load_head("score.weight"), torch.ones(2, 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_name_file_and_key(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors = factors(MODULES, dtype=dtype)
    key = f"{PREFIX}layers.2.q.lora_B.weight"
    tensors[key][3, 1] = value
    adapter = open_adapter(write_folder(tmp_path / "a", tensors, config()))
    with pytest.raises(LoraforgeError, match="NaN or Inf") as caught:
        adapter.load("layers.2.q")
    assert key in str(caught.value) and "adapter_model.safetensors" in str(caught.value)
    assert "1 of 24" in str(caught.value)
    adapter.load("layers.10.q")


def test_large_finite_numbers_are_no_infinity(tmp_path: Path) -> None:
    tensors = {key: torch.full_like(value, 3e38) for key, value in factors(MODULES).items()}
    assert open_adapter(write_folder(tmp_path / "a", tensors, config())).load("layers.2.q").B[0, 0] == 3e38


def test_missing_things(tmp_path: Path) -> None:
    assert "no such adapter folder" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json" in refused(tmp_path / "empty")
    path = simple(tmp_path / "a")
    (path / "adapter_model.safetensors").unlink()
    message = refused(path)
    assert "no weights" in message and "adapter_model.bin" in message
    (path / "adapter_config.json").unlink()
    for name in ("one", "two"):
        save_file({"x.lora_A.weight": torch.ones(2, 2)}, path / f"{name}.safetensors")
    assert "several files of tensors" in refused(path)
    lone = simple(tmp_path / "b")
    (lone / "adapter_config.json").unlink()
    message = refused(lone)
    assert "no adapter_config.json" in message and "alpha = r" in message
    (tmp_path / "text.txt").write_text("x")
    assert "no file of tensors" in refused(tmp_path / "text.txt")


def test_a_file_is_read_with_the_configuration_beside_it(tmp_path: Path) -> None:
    file = simple(tmp_path / "a") / "adapter_model.safetensors"
    adapter = open_adapter(file)
    assert adapter.info("layers.2.q").scaling == 2.0 and adapter.name == "a" and not adapter.notes
    other = tmp_path / "a" / "step-100.safetensors"
    file.rename(other)
    assert open_adapter(other).info("layers.2.q").scaling == 2.0 and open_adapter(other).name == "step-100"
    (tmp_path / "a" / "adapter_config.json").unlink()
    bare = open_adapter(other)
    assert bare.info("layers.2.q").scaling == 1.0 and "alpha = r" in bare.notes[0] and bare.format == "peft"


@pytest.mark.parametrize("keep", [0, 4, 60, -10])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    path = simple(tmp_path / "a")
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(path)
    assert "damaged or incomplete" in message and str(file) in message


def test_garbled_files(tmp_path: Path) -> None:
    path = simple(tmp_path / "a")
    (path / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git-lfs" in refused(path)
    (path / "adapter_model.safetensors").unlink()
    for content in (b"", b"\x00" * 40, b"PK\x03\x04 not a zip"):
        (path / "adapter_model.bin").write_bytes(content)
        message = refused(path)
        assert "adapter_model.bin" in message and "weights_only" not in message


def test_bin_files_never_run_code(tmp_path: Path) -> None:
    path = simple(tmp_path / "a")
    (path / "adapter_model.safetensors").unlink()
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return (Path.touch, (mark,))

    with (path / "adapter_model.bin").open("wb") as handle:
        pickle.dump({"x": Evil()}, handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "could run code" in refused(path)
        torch.save({"x": Evil()}, path / "adapter_model.bin")
        message = refused(path)
    assert "could run code" in message and "weights_only" not in message and "found: the object " in message
    assert not mark.exists()
    torch.save([torch.ones(2)], path / "adapter_model.bin")
    assert "not a dictionary of tensors" in refused(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"r": 8', "\xff\xfe"])
def test_invalid_configurations(tmp_path: Path, text: str) -> None:
    path = simple(tmp_path / "a")
    (path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "adapter_config.json" in refused(path)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"r": None}, "r"),
        ({"r": 0}, "r"),
        ({"r": "8"}, "r"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"bias": "some"}, "bias"),
        ({"modules_to_save": "score"}, "modules_to_save"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, fields: dict[str, Any], part: str) -> None:
    assert f"adapter_config.json: {part}" in refused(simple(tmp_path / "a", **fields))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "pissa_niter_16"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"x": 1}}, "BD-LoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"monteclora_config": {"x": 1}}, "MonteCLoRA"),
        ({"velora_config": {"x": 1}}, "VeLoRA"),
        ({"arrow_config": {"x": 1}}, "Arrow"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"layer_replication": [[0, 2]]}, "layer replication"),
        ({"peft_type": "OFT"}, "not a LoRA adapter"),
        ({"peft_type": "LOHA", "alpha": 4}, "LoRA factors, though its peft_type is LOHA"),
        ({"peft_type": None}, "not a LoRA adapter"),
    ],
)
def test_features_are_refused_by_name(tmp_path: Path, fields: dict[str, Any], name: str) -> None:
    assert name in refused(simple(tmp_path / "a", **fields))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", None])
def test_other_initialisations_are_read(tmp_path: Path, start: Any) -> None:
    assert open_adapter(simple(tmp_path / "a", init_lora_weights=start)).modules


@pytest.mark.parametrize(
    ("key", "shape", "name"),
    [
        ("layers.2.q.hada_w1_a", (6, 4), "LyCORIS"),
        ("layers.2.q.lora_up.weight", (6, 4), "kohya"),
        ("layers.2.q.lora.up.weight", (6, 4), "diffusers"),
        ("layers.2.q.unknown", (6, 4), "no part of a LoRA adapter"),
        ("layers.2.q.bias", (6,), "no part of a LoRA adapter"),
        ("score.weight", (2, 5), "no part of a LoRA adapter"),
        ("../../etc.lora_A.weight", (4, 5), "not acceptable"),
        ("a/b.lora_A.weight", (4, 5), "not dotted module names"),
        ("a..b.lora_A.weight", (4, 5), "not dotted module names"),
        ("a\nb.lora_A.weight", (4, 5), "not acceptable"),
    ],
)
def test_foreign_keys_are_listed(tmp_path: Path, key: str, shape: tuple[int, ...], name: str) -> None:
    message = refused(simple(tmp_path / "a", extra={key: torch.ones(shape)}))
    assert name in message and repr(PREFIX + key) in message


def test_a_module_may_be_called_like_another_format(tmp_path: Path) -> None:
    names = {"layers.1.vera_proj": (6, 4, 5), "lora_unet_block": (6, 4, 5)}
    assert set(open_adapter(simple(tmp_path / "a", modules=names)).modules) == set(names)


def test_keys_without_the_prefix(tmp_path: Path) -> None:
    tensors = {key.removeprefix(PREFIX): value for key, value in factors(MODULES).items()}
    adapter = open_adapter(write_folder(tmp_path / "a", tensors, config()))
    assert adapter.modules == ("layers.2.q", "layers.10.q") and "do not start with" in adapter.notes[0]
    assert adapter.info("layers.2.q").scaling == 2.0
    mixed = {**factors(MODULES), "odd.lora_A.weight": torch.ones(4, 5)}
    assert "do not start with" in refused(write_folder(tmp_path / "b", mixed, config()))


def test_unknown_keys_can_be_passed_over(tmp_path: Path) -> None:
    path = simple(tmp_path / "a", extra={"odd.thing": torch.ones(2)})
    assert "--ignore-unknown" in refused(path)
    adapter = open_adapter(path, ignore_unknown=True)
    assert len(adapter.modules) == 2 and "odd.thing" in adapter.notes[0]


def test_shapes_that_contradict(tmp_path: Path) -> None:
    grouped = {"c.lora_A.weight": torch.ones(4, 3, 3, 3), "c.lora_B.weight": torch.ones(6, 2, 1, 1)}
    message = refused(simple(tmp_path / "conv", extra=grouped))
    assert "grouped convolution" in message and "2 groups" in message
    path = simple(tmp_path / "fit", extra={"c.lora_A.weight": torch.ones(4, 5), "c.lora_B.weight": torch.ones(6, 3)})
    assert "do not fit" in refused(path)
    path = simple(tmp_path / "half", extra={"c.lora_B.weight": torch.ones(6, 4)})
    assert "'c' has lora_B but no lora_A" in refused(path)
    message = refused(simple(tmp_path / "rank", r=8))
    assert "rank 4" in message and "rank 8" in message
    path = write_folder(
        tmp_path / "none", {f"{PREFIX}score.weight": torch.ones(2, 2)}, config(modules_to_save=["score"])
    )
    assert "no LoRA factors" in refused(path)


def test_integer_tensors(tmp_path: Path) -> None:
    assert "unsupported dtype" in refused(
        simple(tmp_path / "a", extra={"x.lora_A.weight": torch.ones(4, 5, dtype=torch.int8)})
    )


def test_all_problems_at_once_but_not_each_module(tmp_path: Path) -> None:
    modules = {f"layers.{i}.q": (6, 4, 5) for i in range(30)}
    path = simple(tmp_path / "a", modules=modules, extra={"odd.key": torch.ones(1)}, r=8)
    with pytest.raises(InputProblems) as caught:
        open_adapter(path)
    message = str(caught.value)
    assert "odd.key" in message and message.count("contradicts") == 6 and "25 more like" in message


def test_symlinks_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert open_adapter(tmp_path / "link").name == "real"
    monkeypatch.chdir(tmp_path / "real")
    assert open_adapter(".").name == "real"
    assert json.loads(Path("adapter_config.json").read_text())["r"] == 4


REAL = {
    "distilbert-imdb": (12, 8, 2.0, 4),
    "distilbert-emotion6": (12, 8, 2.0, 4),
    "bert-base-a32": (24, 8, 4.0, 2),
    "gpt2-cattn-a8": (12, 8, 1.0, 1),
    "opt125m-r16": (24, 16, 2.0, 0),
    "flan-t5-base-r16-final": (36, 16, 2.0, 0),
    "dialogpt-synthetic-r8": (12, 8, 2.0, 0),
    "own-minilm-isear": (12, 8, 2.0, 2),
}


@pytest.mark.parametrize("name", REAL)
def test_real_adapters(data_dir: Path, name: str) -> None:
    adapter = open_adapter(data_dir / "adapters" / name)
    modules, rank, scaling, heads = REAL[name]
    assert len(adapter.modules) == modules and len(adapter.heads) == heads and not adapter.extras
    for module in adapter.modules:
        info, lr = adapter.info(module), adapter.load(module)
        assert (info.rank, info.scaling) == (rank, scaling) and lr.shape == (info.m, info.n)


def test_real_sam_files_need_a_key_map(data_dir: Path) -> None:
    folder = data_dir / "adapters" / "sam-vitb-rank4"
    for path in (folder, next(folder.glob("*.safetensors"))):
        message = refused(path)
        assert "Sam_LoRA" in message and "key map" in message
    names = {f"blocks.{i // 2}.attn.{'qv'[i % 2]}": i for i in range(24)}
    key_map = {name: {"A": f"w_a_{i:03d}", "B": f"w_b_{i:03d}"} for name, i in names.items()}
    adapter = open_adapter(folder, key_map=key_map)
    assert (len(adapter.modules), adapter.format) == (24, "keymap")
    info = adapter.info("blocks.11.attn.v")
    assert (info.rank, info.scaling, info.m, info.n) == (4, 1.0, 768, 768)


def test_weights_that_are_no_file_are_named(tmp_path: Path) -> None:
    path = simple(tmp_path / "a")
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.safetensors").mkdir()
    with pytest.raises(LoraforgeError, match="no regular file") as caught:
        open_adapter(path)
    assert str(path / "adapter_model.safetensors") in str(caught.value.where)
