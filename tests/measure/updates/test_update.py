"""The update of each head against dense matrices in numpy, for the shapes of several families and kinds of LoRA."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraforge.checkpoints import open_checkpoint
from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.files import read_lines
from loraforge.measure.heads.layout import Attention, HeadLayout, Projection
from loraforge.measure.updates.update import measure_update, update_from_dense, update_from_factors
from tests.measure.update_cases import (
    CASES,
    LAYERS,
    Case,
    dense_updates,
    modules_of,
    norms_by_hand,
    slice_of,
    weights_of,
    write_adapter,
    write_base,
)  # fmt: skip
from tests.tasks.tiny import tiny_base

# Both sides in float64: what differs is the order of some hundred additions.
EXACT = 1e-12


def check_lines(lines, case: Case, updates, weights=None, share=True, tolerance=EXACT):
    assert [(line["layer"], line["head"]) for line in lines] == [(i, h) for i in range(LAYERS) for h in range(case.n_q)]
    for line in lines:
        U = norms_by_hand(case, updates, line["layer"], line["head"], share)
        for part, value in U.items():
            assert line[f"U{part}"] == pytest.approx(value, rel=tolerance, abs=1e-300)
        total = math.sqrt(sum(value**2 for value in U.values()))
        assert line["U"] == pytest.approx(total, rel=tolerance)
        if weights is not None:
            n = norms_by_hand(case, weights, line["layer"], line["head"], share)
            assert [line[f"n{part}"] for part in "qkvo"] == pytest.approx(list(n.values()), rel=tolerance)
            assert line["Urel"] == pytest.approx(total / sum(value + 1e-12 for value in n.values()), rel=tolerance)
            assert line["Urel_l2"] == pytest.approx(total / math.hypot(*n.values()), rel=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_factors_equal_dense(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, adapter = write_base(tmp_path / "base", case), write_adapter(tmp_path / "adapter", case)
    result = update_from_factors(adapter, base=base)
    check_lines(result.lines, case, dense_updates(adapter, case), weights_of(base, case))
    assert {line["source"] for line in result.lines} == {"factors"}
    assert [line["kv_head"] for line in result.lines[: case.n_q]] == [
        h * case.n_kv // case.n_q for h in range(case.n_q)
    ]


@pytest.mark.parametrize("name", CASES)
def test_dense_difference_equals_dense(name: str, tmp_path: Path) -> None:
    """Two float32 models: exact against their own float64 difference, 1e-6 against the update that made them."""
    case = CASES[name]
    adapter = write_adapter(tmp_path / "adapter", case)
    updates = dense_updates(adapter, case)
    base = write_base(tmp_path / "base", case)
    final = write_base(tmp_path / "final", case, change={n: torch.from_numpy(u) for n, u in updates.items()})
    old, new = weights_of(base, case), weights_of(final, case)
    result = update_from_dense(base, final)
    check_lines(result.lines, case, {n: new[n] - old[n] for n in new}, old)
    check_lines(result.lines, case, updates, tolerance=1e-6)
    assert {line["source"] for line in result.lines} == {"dense"}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "repeated"])
def test_heads_of_a_group_share_their_key_and_value(share: bool, tmp_path: Path) -> None:
    case = CASES["gqa"]
    base, adapter = write_base(tmp_path / "base", case), write_adapter(tmp_path / "adapter", case)
    result = update_from_factors(adapter, base=base, kv_share=share)
    updates = dense_updates(adapter, case)
    check_lines(result.lines, case, updates, weights_of(base, case), share)
    layer = sum(line["U"] ** 2 for line in result.lines if line["layer"] == 0)
    whole = sum(float((u**2).sum()) for n, u in updates.items() if n.startswith("layers.0."))
    if share:
        assert layer == pytest.approx(whole, rel=EXACT)
    else:
        assert layer > 1.05 * whole
    # The totals are those of the modules either way.
    assert result.totals["heads"] == pytest.approx(math.sqrt(sum(float((u**2).sum()) for u in updates.values())))


def test_rank_stabilised_scale(tmp_path: Path) -> None:
    case = CASES["mha"]
    adapter = write_adapter(tmp_path / "a", case, rank=4, use_rslora=True)
    updates = dense_updates(adapter, case, scale=8 / math.sqrt(4))
    check_lines(update_from_factors(adapter, heads=4).lines, case, updates)


def test_rank_and_alpha_patterns(tmp_path: Path) -> None:
    case = CASES["mha"]
    adapter = write_adapter(
        tmp_path / "a", case, rank=2, ranks={"q_proj": 5}, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 7}
    )
    scales = {"q_proj": 4 / 5, "v_proj": 7 / 2, "k_proj": 2.0, "o_proj": 2.0}
    check_lines(update_from_factors(adapter, heads=4).lines, case, dense_updates(adapter, case, scales))


def test_value_heads_of_another_size(tmp_path: Path) -> None:
    """q and k have 6 rows a head, v and o 3: the layout says so, the numbers follow."""
    from tests.adapters.folders import simple

    shapes = {"layers.0.q": (12, 2, 8), "layers.0.k": (12, 2, 8), "layers.0.v": (6, 2, 8), "layers.0.o": (8, 2, 6)}
    adapter = simple(tmp_path / "a", modules=shapes, r=2, lora_alpha=2)
    places = {p: Projection(f"layers.0.{p}", 2, 6 if p in "qk" else 3) for p in "qkvo"}
    layout = HeadLayout("x", (Attention("dec", "self", 0, 2, 2, **places),), {})
    lines = update_from_factors(adapter, layout=layout).lines
    tensors = load_file(adapter / "adapter_model.safetensors")
    for part, size in (("q", 6), ("k", 6), ("v", 3), ("o", 3)):
        A, B = (tensors[f"base_model.model.layers.0.{part}.lora_{s}.weight"].double().numpy() for s in "AB")
        for head in range(2):
            delta = (
                (B @ A)[:, head * size : (head + 1) * size] if part == "o" else (B @ A)[head * size : (head + 1) * size]
            )
            assert lines[head][f"U{part}"] == pytest.approx(np.linalg.norm(delta), rel=EXACT)


def test_a_tiny_update_beats_merged_weights(tmp_path: Path) -> None:
    """A relative update of 1e-6: factors are exact, the difference of bfloat16 weights is off by its own size."""
    case = CASES["mha"]
    adapter = write_adapter(tmp_path / "a", case, lora_alpha=6e-6)
    updates = dense_updates(adapter, case, scale=2e-6)
    check_lines(update_from_factors(adapter, heads=4).lines, case, updates)
    change = {n: torch.from_numpy(u) for n, u in updates.items()}
    bases = {t: write_base(tmp_path / f"base-{t}", case, dtype=getattr(torch, t)) for t in ("float32", "bfloat16")}
    errors = {}
    for dtype, base in bases.items():
        start = {n: torch.from_numpy(w.copy()) for n, w in weights_of(base, case).items()}
        tensors = {f"model.{n}.weight": (start[n] + change[n]).to(getattr(torch, dtype)) for n in change}
        (tmp_path / f"merged-{dtype}").mkdir()
        save_file(tensors, tmp_path / f"merged-{dtype}" / "model.safetensors")
        result = update_from_dense(base, tmp_path / f"merged-{dtype}")
        true = np.array(
            [math.hypot(*norms_by_hand(case, updates, line["layer"], line["head"]).values()) for line in result.lines]
        )
        found = np.array([line["U"] for line in result.lines])
        errors[dtype] = np.abs(found - true).max() / true.max()
    assert errors["bfloat16"] > 0.5 > 1e-2 > errors["float32"] > 1e-9
    assert any("bfloat16" in warning for warning in result.meta["warnings"])


def test_a_head_that_is_nearly_left_alone(tmp_path: Path) -> None:
    """B_h A cancels to 1e-9 of the other heads: the Gram matrix loses it, QR does not."""
    case = CASES["mha"]
    adapter = write_adapter(tmp_path / "a", case, rank=2)
    path = adapter / "adapter_model.safetensors"
    tensors = {k: v.double() for k, v in load_file(path).items()}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    A, B = tensors[f"{key}A.weight"], tensors[f"{key}B.weight"]
    A[1] = A[0] + 1e-9 * A[1]
    B[:4] = torch.stack([B[:4, 0], -B[:4, 0]], 1)
    save_file(tensors, path, {"format": "pt"})
    line = update_from_factors(adapter, heads=4).lines[0]
    # Rounding of 1 against a result of 1e-9.
    expected = 2 * np.linalg.norm(B[:4, 0].numpy()) * np.linalg.norm((A[1] - A[0]).numpy())
    assert line["Uq"] == pytest.approx(float(expected), rel=1e-6)
    gram = torch.trace((B[:4].mT @ B[:4]) @ (A @ A.mT))
    assert abs(2 * math.sqrt(max(float(gram), 0.0)) - float(expected)) > 0.1 * float(expected)


def test_an_adapter_of_a_classifier_on_a_bare_base(tmp_path: Path) -> None:
    case = CASES["mha"]
    base = write_base(tmp_path / "base", case, prefix="")
    head = {"score.weight": torch.ones(2, 16)}
    adapter = write_adapter(tmp_path / "a", case, task_type="SEQ_CLS", modules_to_save=["score"], extra=head)
    result = update_from_factors(adapter, base=base)
    check_lines(result.lines, case, dense_updates(adapter, case), weights_of(base, case, ""))
    (row,) = result.other_updates
    assert row["name"] == "score.weight" and row["U"] is None and row["norm"] == pytest.approx(math.sqrt(32))
    assert result.totals["unknown"] == ["score.weight"]


def test_models_whose_names_differ_by_a_prefix(tmp_path: Path) -> None:
    case = CASES["mha"]
    base = write_base(tmp_path / "base", case, prefix="")
    final = write_base(tmp_path / "final", case, seed=3, extra={"score.weight": torch.ones(2, 16)})
    result = update_from_dense(base, final)
    old, new = weights_of(base, case, ""), weights_of(final, case)
    check_lines(result.lines, case, {n: new[n] - old[n] for n in new}, old)
    assert [row["name"] for row in result.other_updates] == ["score.weight"]
    assert result.totals["other"] is None  # only with --scope all is the rest known


def test_trained_heads_are_measured_where_the_base_has_them(tmp_path: Path) -> None:
    case = CASES["mha"]
    base = write_base(tmp_path / "base", case, extra={"score.weight": torch.ones(2, 16)})
    extra = {"score.weight": torch.full((2, 16), 1.5)}
    adapter = write_adapter(tmp_path / "a", case, task_type="SEQ_CLS", modules_to_save=["score"], extra=extra)
    (row,) = update_from_factors(adapter, base=base).other_updates
    assert row["U"] == pytest.approx(0.5 * math.sqrt(32)) and row["Urel"] == pytest.approx(0.5)


def test_scope_all_lists_what_is_outside_the_heads(tmp_path: Path) -> None:
    from tests.adapters.folders import factors

    case = CASES["mha"]
    mlp = factors({"model.layers.0.mlp.up_proj": (24, 3, 16)}, seed=9)
    extra = {key.removeprefix("base_model.model."): value for key, value in mlp.items()}
    adapter = write_adapter(tmp_path / "a", case, extra=extra)
    weight = {"model.layers.0.mlp.up_proj.weight": torch.full((24, 16), 0.5)}
    base = write_base(tmp_path / "base", case, extra=weight)
    result = update_from_factors(adapter, base=base, scope="all")
    B, A = (mlp[f"base_model.model.model.layers.0.mlp.up_proj.lora_{s}.weight"].double() for s in "BA")
    (row,) = result.other_updates
    assert (row["name"], row["r"], row["what"]) == ("model.layers.0.mlp.up_proj", 3, "linear")
    assert row["U"] == pytest.approx(float((2 * B @ A).norm()), rel=EXACT)
    assert row["Urel"] == pytest.approx(row["U"] / (0.5 * math.sqrt(24 * 16)), rel=EXACT)
    assert result.totals["all"] == pytest.approx(math.hypot(result.totals["heads"], row["U"]))
    short = update_from_factors(adapter, base=base)
    assert short.other_updates == [] and short.totals == result.totals


def test_dora_needs_the_base_and_is_exact_with_it(tmp_path: Path) -> None:
    case = CASES["gpt2"]
    name = "transformer.h.0.attn.c_attn"
    magnitude = torch.linspace(0.5, 2.0, 48)
    base = write_base(tmp_path / "base", case)
    key = f"{name}.lora_magnitude_vector.weight"
    adapter = write_adapter(tmp_path / "a", case, only=(name,), use_dora=True, extra={key: magnitude})
    with pytest.raises(LoraforgeError, match="DoRA") as caught:
        update_from_factors(adapter, heads=4)
    assert name in str(caught.value) and "--base" in str(caught.value)
    result = update_from_factors(adapter, base=base)
    W = weights_of(base, case)["h.0.attn.c_attn"]
    moved = W + dense_updates(adapter, case)["h.0.attn.c_attn"]
    change = magnitude.double().numpy()[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - W
    check_lines(result.lines, case, {"h.0.attn.c_attn": change}, weights_of(base, case))
    assert [line["source"] for line in result.lines] == ["dense"] * 4 + ["factors"] * 4


def test_a_projection_that_the_adapter_carries_whole(tmp_path: Path) -> None:
    case = CASES["mha"]
    base = write_base(tmp_path / "base", case)
    whole = {"model.layers.1.self_attn.k_proj.weight": torch.ones(16, 16)}
    settings = {"modules_to_save": ["layers.1.self_attn.k_proj"], "extra": whole}
    adapter = write_adapter(tmp_path / "a", case, only=("q_proj",), **settings)
    with pytest.raises(LoraforgeError, match="carries whole"):
        update_from_factors(adapter, config=base)
    updates = dense_updates(adapter, case)
    updates["layers.1.self_attn.k_proj"] = 1.0 - weights_of(base, case)["layers.1.self_attn.k_proj"]
    result = update_from_factors(adapter, base=base)
    check_lines(result.lines, case, updates, weights_of(base, case))
    assert result.other_updates == []


def test_bias_columns(tmp_path: Path) -> None:
    case = CASES["gqa"]
    names = [f"model.{n}" for n in modules_of(case, "") if n.endswith(("q_proj", "k_proj"))]
    biases = {f"{n}.bias": torch.zeros(16 if n.endswith("q_proj") else 8) for n in names}
    base = write_base(tmp_path / "base", case, extra=biases)
    trained = {key: torch.arange(len(value), dtype=torch.float32) for key, value in biases.items()}
    adapter = write_adapter(tmp_path / "a", case, bias="all", extra=trained)
    plain, result = (update_from_factors(adapter, base=base, bias=bias) for bias in (False, True))
    assert [line["U"] for line in plain.lines] == [line["U"] for line in result.lines]
    assert "Ubq" not in plain.lines[0]
    for line in result.lines:
        h = line["head"]
        assert line["Ubq"] == pytest.approx(np.linalg.norm(np.arange(4 * h, 4 * h + 4)))
        kv = h // 2
        assert line["Ubk"] == pytest.approx(np.linalg.norm(np.arange(4 * kv, 4 * kv + 4)) / math.sqrt(2))
        assert line["Ubv"] == 0.0
    assert {row["what"] for row in result.other_updates} == {"bias"}


def test_a_zero_slice_of_the_base(tmp_path: Path) -> None:
    case = CASES["mha"]
    base = write_base(tmp_path / "base", case)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][4:8] = 0.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    result = update_from_factors(write_adapter(tmp_path / "a", case), base=base)
    assert [line["Urel"] is None for line in result.lines] == [False] * 5 + [True] + [False] * 2
    assert result.lines[5]["Urel_l2"] is None and "layer 1 head 1" in result.meta["warnings"][0]


def test_an_adapter_alone(tmp_path: Path) -> None:
    """By counts, by a file, by a folder that the adapter names; parts that it lacks are not changed."""
    case = CASES["gqa"]
    base = write_base(tmp_path / "base", case)
    adapter = write_adapter(tmp_path / "a", case, only=("q_proj", "v_proj"))
    named = write_adapter(tmp_path / "b", case, only=("q_proj", "v_proj"), base_model_name_or_path=str(base))
    updates = dense_updates(adapter, case)
    ways = [
        update_from_factors(adapter, heads=4, kv_heads=2),
        update_from_factors(adapter, config=base / "config.json"),
        update_from_factors(adapter, config=json.loads((base / "config.json").read_text())),
        update_from_factors(named),
    ]
    for result in ways:
        check_lines(result.lines, case, updates)
        assert {line[key] for line in result.lines for key in ("Urel", "nq", "OV")} == {None}
    for lost in (None, "/elsewhere/base", "someone/base"):
        nameless = write_adapter(tmp_path / f"c{str(lost)[:2].strip('/')}", case, base_model_name_or_path=lost)
        with pytest.raises(LoraforgeError, match="how many heads") as caught:
            update_from_factors(nameless)
        assert all(option in str(caught.value) for option in ("--base", "--config", "--heads"))


def test_wrong_counts_and_wrong_bases_are_refused(tmp_path: Path) -> None:
    case = CASES["mha"]
    adapter = write_adapter(tmp_path / "a", case)
    with pytest.raises(LoraforgeError, match="heads"):
        update_from_factors(adapter, heads=5)
    base, other = write_base(tmp_path / "base", case), write_base(tmp_path / "other", CASES["wide-heads"])
    with pytest.raises(LoraforgeError, match="does not belong to this base"):
        update_from_factors(adapter, base=other)
    with pytest.raises(LoraforgeError, match="does not belong to this base"):
        update_from_dense(base, other)
    with pytest.raises(LoraforgeError, match="does not belong to this base"):
        update_from_factors(write_adapter(tmp_path / "n", CASES["gpt2"]), base=base)


def test_kohya_files_are_read_too(tmp_path: Path) -> None:
    import loraforge as lf

    case = CASES["mha"]
    base, adapter = write_base(tmp_path / "base", case), write_adapter(tmp_path / "a", case)
    lf.convert(adapter, tmp_path / "kohya", to="kohya")
    result = update_from_factors(tmp_path / "kohya", base=base)
    # kohya keeps alpha; the scale is the same up to its rounding to the file's dtype.
    check_lines(result.lines, case, dense_updates(adapter, case), weights_of(base, case), tolerance=1e-7)
    assert result.meta["format"] == "kohya"


def test_files_cache_and_profiles(tmp_path: Path) -> None:
    case = CASES["gqa"]
    base, adapter = write_base(tmp_path / "base", case), write_adapter(tmp_path / "a", case)
    cache, out = tmp_path / "base_norms.json", tmp_path / "out" / "update.jsonl"
    first = measure_update(base, adapter=adapter, out=out, cache=cache, circuits=False)
    kept = cache.read_bytes()
    second = measure_update(base, adapter=adapter, cache=cache, circuits=False)
    assert first["lines"] == second["lines"] == read_lines(out) and cache.read_bytes() == kept
    entries = json.loads(kept)["norms"]
    assert len(entries) == 1
    # The cache is what is read: a changed entry shows.
    next(iter(entries.values()))[0]["q"][0] = 1e6
    cache.write_text(json.dumps({"norms": entries}))
    assert measure_update(base, adapter=adapter, cache=cache, circuits=False)["lines"][0]["nq"] == 1e6
    meta = json.loads((tmp_path / "out" / "update.meta.json").read_text())
    assert meta["totals"] == first["totals"] and meta["kv_share"] is True
    with pytest.raises(LoraforgeError, match="exists"):
        measure_update(base, adapter=adapter, out=out)
    document = measure_update(base, adapter=adapter, out=out, profile="seed", norm="seed", overwrite=True)
    assert list(read_lines(out)[0]) == ["layer", "head", "U", "Urel", "Uq", "Uk", "Uv", "Uo"]
    assert document["meta"]["norm"] == "document"
    cache.write_text("[]")
    with pytest.raises(LoraforgeError, match="no cache"):
        measure_update(base, adapter=adapter, cache=cache)


@pytest.mark.parametrize(
    "arguments", [{}, {"adapter": "a", "final": "b"}, {"final": "b"}], ids=["none", "both", "no-base"]
)
def test_usage(arguments: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        measure_update(None, **arguments)


def test_neither_transformers_nor_peft_is_loaded(tmp_path: Path) -> None:
    case = CASES["mha"]
    base, adapter = write_base(tmp_path / "base", case), write_adapter(tmp_path / "a", case)
    code = (
        "import sys; from loraforge.measure.updates.update import measure_update as m; "
        f"m({str(base)!r}, adapter={str(adapter)!r}); m({str(base)!r}, final={str(base)!r}); "
        "sys.exit(any(name in sys.modules for name in ('transformers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


REAL = {
    "distilbert-imdb": 12, "bert-base-a32": 12, "gpt2-cattn-a16": 12, "dialogpt-synthetic-r8": 12, "opt125m-r16": 12,
    "flan-t5-base-r16-final": 12, "own-minilm-isear": 12,
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_adapters(name: str, data_dir: Path) -> None:
    """All of the update is in heads here, so their norms add up to that of the dense matrices."""
    folder = data_dir / "adapters" / name
    result = update_from_factors(folder, heads=REAL[name])
    tensors = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    total = 0.0
    for key, A in tensors.items():
        if key.endswith("lora_A.weight"):
            B = tensors[key.replace("lora_A", "lora_B")].double()
            # ||B A||^2 = <B^T B, A A^T>: not the way of the code, and exact enough for a sum.
            total += scale**2 * float(((B.mT @ B) * (A.double() @ A.double().mT)).sum())
    assert math.sqrt(sum(line["U"] ** 2 for line in result.lines)) == pytest.approx(math.sqrt(total), rel=1e-10)
    assert all(math.isfinite(line["U"]) for line in result.lines) and len(result.lines) % 12 == 0


def test_an_adapter_of_other_modules_alone(tmp_path: Path) -> None:
    """Nothing of it is in a head: zeros that are true, with a warning."""
    from tests.adapters.folders import simple

    case = CASES["mha"]
    base = write_base(tmp_path / "base", case, extra={"model.layers.0.mlp.up_proj.weight": torch.ones(24, 16)})
    adapter = simple(tmp_path / "a", modules={"model.layers.0.mlp.up_proj": (24, 2, 16)}, r=2)
    result = update_from_factors(adapter, base=base)
    assert {line["U"] for line in result.lines} == {0.0} and {line["Urel"] for line in result.lines} == {0.0}
    assert "no projection" in result.meta["warnings"][0] and result.totals["share_of_heads"] == 0.0


def test_a_fused_projection_of_unknown_order(tmp_path: Path) -> None:
    """gpt_neox alternates q, k and v: its name alone does not say so, its configuration does."""
    case = CASES["gpt_neox"]
    adapter = write_adapter(tmp_path / "a", case)
    check_lines(update_from_factors(adapter, config=case.config).lines, case, dense_updates(adapter, case))
    with pytest.raises(LoraforgeError, match="order of q, k and v") as caught:
        update_from_factors(adapter, heads=4)
    assert "--config" in str(caught.value)


def test_circuits_are_there_where_the_base_is(tmp_path: Path) -> None:
    case = CASES["gqa"]
    base, adapter = write_base(tmp_path / "base", case), write_adapter(tmp_path / "a", case)
    updates, weights = dense_updates(adapter, case), weights_of(base, case)
    for line in update_from_factors(adapter, base=base).lines:
        at = (line["layer"],)
        old = {p: slice_of(case, weights, *at, p, line["head"]) for p in "qkvo"}
        new = {p: old[p] + slice_of(case, updates, *at, p, line["head"]) for p in "qkvo"}
        OV, QK = (np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in (
            (old["o"] @ old["v"], new["o"] @ new["v"]), (old["q"].T @ old["k"], new["q"].T @ new["k"])))  # fmt: skip
        assert line["OV"] == pytest.approx(OV, rel=1e-10) and line["QK"] == pytest.approx(QK, rel=1e-10)


def test_a_base_that_the_training_did_not_start_from_is_told(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base", "bert", seed=1)
    tiny_base(tmp_path / "other", "bert", seed=2)
    tiny_base(tmp_path / "final", "bert", seed=3)
    digests = open_checkpoint(tmp_path / "base").sha256s
    (tmp_path / "final" / "run.json").write_text(json.dumps({"base_sha256": digests}))
    right, wrong = (measure_update(tmp_path / name, final=tmp_path / "final") for name in ("base", "other"))
    assert right["meta"]["warnings"] == []
    assert ["is not the base" in text for text in wrong["meta"]["warnings"]] == [True]
