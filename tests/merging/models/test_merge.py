"""Full models merged as task vectors: equal to dense arithmetic on what transformers loads, whatever the method."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from loraforge.cli.app import app
from loraforge.errors import LoraforgeError
from loraforge.input_stats import collect_stats
from loraforge.linalg.rank import RankRule
from loraforge.merging.methods import METHODS, find_method
from loraforge.merging.models.merge import merge_models
from loraforge.merging.models.task_vectors import matrix_shape
from loraforge.merging.options import post_params

TASKS = 8
ROWS = sorted(name for name, row in METHODS.items() if row.checkpoints)
CONV = "vit.embeddings.patch_embeddings.projection.weight"


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """A base and eight models with low-rank changes of the matrices and small ones of everything else."""
    place = tmp_path_factory.mktemp("vits")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_channels=1, num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    base = ViTForImageClassification(config)
    base.save_pretrained(place / "base")
    for task in range(TASKS):
        tuned = ViTForImageClassification(config)
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            for weight in tuned.parameters():
                m, n = matrix_shape(weight.shape)
                delta = torch.randn(m, 4) @ torch.randn(4, n) if m > 1 else 0.1 * torch.randn(1, n)
                weight += 0.02 * delta.view(weight.shape)
        tuned.save_pretrained(place / f"task{task}")
    return place


def merge(place, out, method="task-arithmetic", models=None, values=None, post="none", **options):
    row = find_method(method)
    params = row.make_params(values or {})
    paths = models or [place / f"task{task}" for task in range(TASKS)]
    return merge_models(
        paths,
        row,
        params,
        base=options.pop("base", place / "base"),
        out=out,
        post=post_params(row, params, post),
        **options,
    )


def states(place):
    """Base weights and task vectors under the names of the loaded model, numpy float64."""
    base, *tuned = (loaded(place / name) for name in ["base", *(f"task{t}" for t in range(TASKS))])
    return base, [{key: state[key] - base[key] for key in base} for state in tuned]


def loaded(out):
    model, info = ViTForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return {key: tensor.double().numpy() for key, tensor in model.state_dict().items()}


def close(found, expected, tolerance=2e-6):
    """Float32 results against float64 arithmetic."""
    assert found.keys() == expected.keys()
    for key in expected:
        scale = np.abs(expected[key]).max()
        assert np.abs(found[key] - expected[key]).max() <= tolerance * max(scale, 1.0), key


def test_task_arithmetic(vits, tmp_path):
    weights = [1.0, -0.5, 0.25, 2.0, 0.0, 1.0, 0.1, 0.3]
    report = merge(vits, tmp_path / "out", weights=weights)
    base, deltas = states(vits)
    close(
        loaded(tmp_path / "out"),
        {k: base[k] + sum(w * d[k] for w, d in zip(weights, deltas, strict=True)) for k in base},
    )
    assert report["output_kind"] == "model"
    assert report["parameters"] == sum(b.size for b in base.values())
    assert report["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["adapters"][0]["files"].keys() == {"model.safetensors"}
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert written["base_sha256"] == report["base_sha256"]
    assert "task-arithmetic" in (tmp_path / "out" / "README.md").read_text()


def test_weighted_average(vits, tmp_path):
    merge(vits, tmp_path / "out", "weighted-average")
    base, deltas = states(vits)
    close(loaded(tmp_path / "out"), {k: base[k] + sum(d[k] for d in deltas) / TASKS for k in base})


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_iso_c(vits, tmp_path, alpha):
    """The mean over the support: equal to the paper's mean over all, because these sums have full rank."""
    merge(vits, tmp_path / "out", "iso-c", values={"alpha": alpha})
    base, deltas = states(vits)
    expected = {}
    for key, weight in base.items():
        if weight.ndim == 2:
            U, S, Vh = np.linalg.svd(sum(d[key] for d in deltas), full_matrices=False)
            assert S[-1] > 1e-4 * S[0]
            expected[key] = weight + alpha * S.mean() * U @ Vh
        else:
            expected[key] = weight + alpha * sum(d[key] for d in deltas) / TASKS
    close(loaded(tmp_path / "out"), expected, 1e-5)


def test_iso_after_any_method(vits, tmp_path):
    merge(vits, tmp_path / "a", "task-arithmetic", post="iso")
    merge(vits, tmp_path / "b", "iso-c")
    a, b = loaded(tmp_path / "a"), loaded(tmp_path / "b")
    matrices = [k for k in a if a[k].ndim == 2]
    close({k: a[k] for k in matrices}, {k: b[k] for k in matrices})


def test_rank_rule(vits, tmp_path):
    report = merge(vits, tmp_path / "out", rule=RankRule(rank=3))
    base, deltas = states(vits)
    expected, lost, size = {}, 0.0, 0.0
    for key, weight in base.items():
        total = sum(d[key] for d in deltas)
        if weight.ndim == 2:
            U, S, Vh = np.linalg.svd(total, full_matrices=False)
            expected[key] = weight + (U[:, :3] * S[:3]) @ Vh[:3]
            lost, size = lost + (S[3:] ** 2).sum(), size + (S**2).sum()
        else:
            expected[key] = weight + total
    close(loaded(tmp_path / "out"), expected, 5e-6)
    assert report["relative_error"] == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert report["rank_max"] == 3


@pytest.mark.parametrize("method", ROWS)
def test_every_method_gives_a_model(vits, tmp_path, method):
    models = [vits / "task0", vits / "task1"] if METHODS[method].counts[1] == 2 else None
    merge(vits, tmp_path / "out", method, models)
    found = loaded(tmp_path / "out")
    base, _ = states(vits)
    assert all(np.isfinite(v).all() for v in found.values())
    assert any(np.abs(found[key] - base[key]).max() > 1e-4 for key in base if base[key].ndim == 2)
    merge(vits, tmp_path / "again", method, models)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_ties_over_the_whole_model(vits, tmp_path):
    """Thresholds over all tensors of a model, vectors and convolutions among them."""
    merge(vits, tmp_path / "out", "ties", values={"density": 0.3})
    base, deltas = states(vits)
    kept = []
    for delta in deltas:
        # Magnitudes as float32 differences, as the merge sees them.
        flat = np.sort(np.concatenate([np.abs(d).ravel() for d in delta.values()]))[::-1]
        threshold = flat[int(0.3 * flat.size) - 1] * (1 - 1e-7)
        kept.append({k: np.where(np.abs(d) >= threshold, d, 0.0) for k, d in delta.items()})
    expected = {}
    for key, weight in base.items():
        trimmed = np.stack([k[key] for k in kept])
        sign = np.sign(trimmed.sum(axis=0))
        agrees = (np.sign(trimmed) == sign) & (sign != 0)
        expected[key] = weight + (trimmed * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)
    close(loaded(tmp_path / "out"), expected)


@pytest.mark.filterwarnings("ignore:.*calibration:UserWarning")
def test_input_statistics_by_the_names_in_memory(vits, tmp_path):
    """The files keep older names of these modules than the model that the statistics were collected on."""
    generator = torch.Generator().manual_seed(1)
    stats = []
    for i in range(2):
        pixels = torch.rand(8, 1, 8, 8, generator=generator) * (1 + i)
        save_file({"pixel_values": pixels}, tmp_path / f"data{i}.safetensors")
        stats.append(tmp_path / f"stats{i}.safetensors")
        collect_stats(vits / "base", tmp_path / f"data{i}.safetensors", stats[i])
    models = [vits / "task0", vits / "task1"]
    # A low-rank part this small leaves the sparse part something to choose by the statistics.
    values = {"rank_ratio": 0.2, "sparsity": 0.5}
    merge(vits, tmp_path / "with", "iso-iasad", models, values, stats=stats)
    merge(vits, tmp_path / "without", "iso-iasad", models, values)
    a, b = loaded(tmp_path / "with"), loaded(tmp_path / "without")
    name = "vit.layers.0.attention.q_proj.weight"
    assert np.abs(a[name] - b[name]).max() > 1e-5
    with pytest.raises(LoraforgeError, match="statistics"):
        merge(vits, tmp_path / "out", "task-arithmetic", models, stats=stats)


def test_shards_and_bin_give_the_same_bytes(vits, tmp_path):
    merge(vits, tmp_path / "plain")
    state = load_file(vits / "task1" / "model.safetensors")
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    models = [vits / "task0", tmp_path / "bin", *(vits / f"task{t}" for t in range(2, TASKS))]
    merge(vits, tmp_path / "sharded", models=models, shard_bytes=4000)
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 2
    one, two = loaded(tmp_path / "plain"), loaded(tmp_path / "sharded")
    assert all(np.array_equal(one[key], two[key]) for key in one)
    # A sharded model is an input like any other.
    merge(vits, tmp_path / "again", models=[tmp_path / "sharded"])
    close(loaded(tmp_path / "again"), one)


def test_dtype(vits, tmp_path):
    report = merge(vits, tmp_path / "out", dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    # bfloat16 has 8 bits: half a unit in the last place is 2^-9 at most.
    assert 0 < report["rounding"] < 2**-8


def test_float64_stays_exact(tmp_path):
    generator = torch.Generator().manual_seed(3)
    tensors = [{"w.weight": torch.randn(9, 7, generator=generator, dtype=torch.float64)} for _ in range(3)]
    for name, state in zip("bxy", tensors, strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    merge(tmp_path, tmp_path / "out", "iso-c", files, base=tmp_path / "b.safetensors")
    W, x, y = (t["w.weight"].numpy() for t in tensors)
    U, S, Vh = np.linalg.svd(x + y - 2 * W)
    found = load_file(tmp_path / "out" / "model.safetensors")["w.weight"].numpy()
    assert np.abs(found - (W + S.mean() * U[:, :7] @ Vh)).max() < 1e-10


def state_files(place, *states):
    for name, state in zip(["base", "a", "b", "c"], states, strict=False):
        save_file(state, place / f"{name}.safetensors")
    return [place / f"{name}.safetensors" for name in ["base", "a", "b", "c"][: len(states)]]


def tiny(seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    return {"q.weight": torch.randn(4, 3, generator=generator), "q.bias": torch.randn(4, generator=generator), **extra}


def test_heads_of_their_own_are_kept_aside(tmp_path):
    base, a, b = state_files(
        tmp_path,
        tiny(head=torch.zeros(2, 4)),
        tiny(1, head=torch.ones(3, 4)),
        tiny(2, head=torch.ones(2, 4), more=torch.ones(1)),
    )
    report = merge(tmp_path, tmp_path / "out", models=[a, b], base=base)
    assert load_file(tmp_path / "out" / "heads" / "a" / "model.safetensors")["head"].shape == (3, 4)
    assert load_file(tmp_path / "out" / "heads" / "b" / "model.safetensors").keys() == {"more"}
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["head"], torch.ones(2, 4))
    assert any("heads/a" in note for note in report["warnings"])


def test_missing_tensors(tmp_path):
    lacking = {"q.weight": tiny(2)["q.weight"]}
    base, a, b = state_files(tmp_path, tiny(), tiny(1), lacking)
    bias = {name: file["q.bias"] for name, file in (("base", tiny()), ("a", tiny(1)))}
    report = merge(tmp_path, tmp_path / "zero", "weighted-average", [a, b], base=base)
    assert any("lacks 1 tensors" in note for note in report["warnings"])
    merge(tmp_path, tmp_path / "present", "weighted-average", [a, b], base=base, on_missing="present")
    half = bias["base"] + 0.5 * (bias["a"] - bias["base"])
    torch.testing.assert_close(load_file(tmp_path / "zero" / "model.safetensors")["q.bias"], half)
    torch.testing.assert_close(load_file(tmp_path / "present" / "model.safetensors")["q.bias"], bias["a"])
    with pytest.raises(LoraforgeError, match=r"b: q\.bias"):
        merge(tmp_path, tmp_path / "error", models=[a, b], base=base, on_missing="error")


def test_text_projections_are_averaged(tmp_path):
    def with_projection(value):
        return tiny(text_projection=torch.full((2, 3), value))

    base, a, b = state_files(tmp_path, with_projection(0.0), with_projection(1.0), with_projection(2.0))
    merge(tmp_path, tmp_path / "out", "iso-c", [a, b], base=base)
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "model.safetensors")["text_projection"], torch.full((2, 3), 1.5)
    )


def test_integers(tmp_path):
    base, a, b = state_files(
        tmp_path, *(tiny(i, steps=torch.tensor([1, 2 + (i > 1)]), mask=torch.tensor([True])) for i in range(3))
    )
    merge(tmp_path, tmp_path / "out", models=[a], base=base)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["steps"], torch.tensor([1, 2]))
    with pytest.raises(LoraforgeError, match=r"b\.safetensors: steps"):
        merge(tmp_path, tmp_path / "other", models=[a, b], base=base)


def test_nan_names_file_and_tensor(tmp_path):
    base, a = state_files(tmp_path, tiny(), tiny(1))
    broken = tiny(1)
    broken["q.bias"][2] = float("inf")
    save_file(broken, a)
    with pytest.raises(LoraforgeError, match=r"a\.safetensors: q\.bias"):
        merge(tmp_path, tmp_path / "out", models=[a], base=base)
    assert not (tmp_path / "out").exists()


def test_overflow_of_the_output_dtype(tmp_path):
    large = tiny()
    large["q.weight"][0, 0] = 1e5
    base, a = state_files(tmp_path, tiny(), large)
    with pytest.raises(LoraforgeError, match=r"q\.weight"):
        merge(tmp_path, tmp_path / "out", models=[a], base=base, dtype="float16")


def test_overflow_of_what_is_only_copied(tmp_path):
    """A dtype of smaller range must not turn a copied weight into Inf; a mask's own -inf stays."""
    mask = {"mask": torch.tensor([0.0, -torch.inf])}
    base, model = state_files(tmp_path, tiny(far=torch.tensor([1e6])) | mask, tiny(1))
    row = find_method("task-arithmetic")
    options = {"base": base, "out": tmp_path / "out", "dtype": "float16"}
    with pytest.raises(LoraforgeError, match="does not fit") as caught:
        merge_models([model], row, row.make_params({}), **options)
    assert caught.value.where == "far"
    base, model = state_files(tmp_path, tiny() | mask, tiny(1))
    merge_models([model], row, row.make_params({}), **options | {"base": base})
    assert load_file(tmp_path / "out" / "model.safetensors")["mask"].tolist() == [0.0, -torch.inf]


def test_a_merge_that_overflows_is_refused(tmp_path):
    base, model = state_files(tmp_path, tiny(), tiny(1))
    row = find_method("task-arithmetic")
    with pytest.raises(LoraforgeError, match="NaN or Inf"):
        merge_models([model], row, row.make_params({}), base=base, out=tmp_path / "out", weights=[1e39])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kept", "told"), [(1.0, False), (0.0, True)])
def test_another_base_of_the_same_shapes_is_told(tmp_path, kept, told):
    """Two unrelated models differ by sqrt(2) of their size, a fine-tuned one by little."""
    one, other = (torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    base, model = state_files(tmp_path, {"w": one}, {"w": kept * one + (1.0 - 0.9 * kept) * other})
    row = find_method("task-arithmetic")
    report = merge_models([model], row, row.make_params({}), base=base, out=tmp_path / "out")
    assert any("was it fine-tuned from" in note for note in report["warnings"]) == told
    assert not told or "is 1.4" in report["warnings"][-1]


@pytest.mark.parametrize("lacking", ["lm_head.weight", "transformer.wte.weight"])
def test_a_tied_weight_that_only_the_base_holds_twice(tmp_path, lacking):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    for name in ("base", "task"):
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    for name in ("base", "task"):
        file = tmp_path / name / "model.safetensors"
        state = load_file(file)
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()
        if name == "task":
            del state[lacking]
        save_file(state, file, {"format": "pt"})
    row = find_method("task-arithmetic")
    report = merge_models([tmp_path / "task"], row, row.make_params({}), base=tmp_path / "base", out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    task = load_file(tmp_path / "task" / "model.safetensors")
    kept = ({"lm_head.weight", "transformer.wte.weight"} - {lacking}).pop()
    torch.testing.assert_close(found[kept], task[kept])
    assert not any("lacks" in note for note in report["warnings"])


def test_refusals(vits, tmp_path):
    with pytest.raises(LoraforgeError, match="base"):
        merge(vits, tmp_path / "out", base=None)
    with pytest.raises(LoraforgeError, match="one of the inputs"):
        merge(vits, vits / "task0", overwrite=True)
    with pytest.raises(LoraforgeError, match="does not merge full models"):
        merge(vits, tmp_path / "out", "concat")
    merge(vits, tmp_path / "out", models=[vits / "task0"])
    with pytest.raises(LoraforgeError, match="exists"):
        merge(vits, tmp_path / "out", models=[vits / "task0"])
    merge(vits, tmp_path / "out", models=[vits / "task1"], overwrite=True)


def test_dry_run(vits, tmp_path, monkeypatch):
    """The plan has the keys that the command prints; no file is read whole for it."""
    monkeypatch.setattr("loraforge.checkpoints.checkpoint.sha256_of", lambda path: pytest.fail("hashed"))
    plan = merge(vits, None, dry_run=True)["plan"]
    assert plan["tensors"] == plan["matrices"] + plan["others"]
    assert plan["matrices"] == len(plan["modules"]) and plan["output_bytes"] > 0
    assert plan["modules"][0].keys() == {"module", "shape", "ranks", "rank_out", "at_most"}
    cut = merge(vits, None, "iso-c", dry_run=True, rule=RankRule(rank=3))["plan"]
    assert cut["flops"] > plan["flops"] and cut["modules"][0]["rank_out"] == 3
    models = [str(vits / name) for name in ("task0", "task1")]
    base, out = str(vits / "base"), str(tmp_path / "out")
    command = ["merge", *models, "--method", "ties", "--base", base, "--out", out, "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "nothing was written" in shown.output and not (tmp_path / "out").exists()


PEAK = """
import sys
from pathlib import Path
from loraforge.merging.methods import find_method
from loraforge.merging.models.merge import merge_models
place, count = Path(sys.argv[1]), sys.argv[2]
row = find_method("task-arithmetic")
models = [place / f"{name}{count}.safetensors" for name in "abcd"]
merge_models(models, row, row.make_params(), base=place / f"base{count}.safetensors", out=place / f"out{count}")
# ru_maxrss of a child starts at what its parent had; VmHWM is this process's own.
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path):
    """48 tensors of 1 MiB from five models (240 MiB) against 4 of them: far less than the difference more."""
    peaks = {}
    for count in (4, 48):
        for seed, name in enumerate(["base", "a", "b", "c", "d"]):
            generator = torch.Generator().manual_seed(seed)
            state = {f"l{i}.weight": torch.randn(512, 512, generator=generator) for i in range(count)}
            save_file(state, tmp_path / f"{name}{count}.safetensors")
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), str(count)], capture_output=True, text=True, check=True
        )
        peaks[count] = int(done.stdout.split()[-1]) / 1024
    assert peaks[48] - peaks[4] < 24, peaks
