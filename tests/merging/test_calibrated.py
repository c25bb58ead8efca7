"""The calibrated methods from adapter folders and tensors to a merged adapter, on tiny models of six families.

The yardstick is a brute force in dense arithmetic: modules one after another, inputs caught by hooks in models whose
weights are really changed, each solved by the independent oracle.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loraforge as lf
from loraforge.errors import LoraforgeError, UsageError
from loraforge.merging.iteris import ALPHAS, RHOS
from tests.adapters import folders
from tests.calibrate import models
from tests.oracles import iteris as oracle

Deltas = dict[str, Tensor]
NAMES = ("a", "b")
# The defaults of the methods may change; nothing here rests on them.
FIXED: dict[str, Any] = {
    "init": "sweep", "verify": True, "max_iter": 40, "convergence_threshold": 1e-10, "target": "task",
    "with_pretrain_matrix": 0, "lambda_weight": "full", "alpha_1": 1e-4, "alpha_2": 1e-4, "reg_ceof": 0.0,
    "cross_norm": "exact", "offdiag": 1.0, "use_mats": False, "use_camr": False, "use_dcs": False,
    "collect": "teacher-forced", "base_dtype": "float64", "samples_num": 100, "max_length": 64,
}  # fmt: skip


class Bench:
    """A tiny model in float64, two adapters on disk and their calibration inputs."""

    def __init__(self, family: str, folder: Path) -> None:
        self.case, self.family = models.make(family), family
        g = torch.Generator().manual_seed(4)
        if family == "blip":  # initial weights of 1e-10 would make images that nobody sees
            for p in self.case.model.vision_model.parameters():
                p.data = 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64)
        self.inputs = {name: models.inputs_of(family, g, 6, 9) for name in NAMES}
        for inputs in self.inputs.values():  # what a file of pixels holds
            inputs |= {k: v.float().double() for k, v in inputs.items() if v.is_floating_point()}
        self.factors = self.case.factors(2, rank=2)
        self.modules = self.case.modules()
        self.deltas = [
            {n: p[i].to(torch.float32).delta(torch.float64) for n, p in self.factors.items()} for i in range(2)
        ]
        self.paths = [self._write(folder / name, i) for i, name in enumerate(NAMES)]

    def _write(self, path: Path, index: int) -> Path:
        tensors = {}
        for name, pairs in self.factors.items():
            tensors[f"{folders.PREFIX}{name}.lora_A.weight"] = pairs[index].A.float()
            tensors[f"{folders.PREFIX}{name}.lora_B.weight"] = pairs[index].B.float()
        conv = any(type(m).__name__ == "Conv1D" for m in self.modules.values())
        targets = sorted({name.rsplit(".", 1)[-1] for name in self.modules})
        settings = folders.config(r=2, lora_alpha=2, target_modules=targets, task_type=None, fan_in_fan_out=conv)
        return folders.write_folder(path, tensors, settings)

    def merge(self, method: str = "iteris-plus", *, inputs: Any = None, options: Any = None, **params: Any) -> Any:
        options = {"calibration": inputs or self.inputs, "base": self.case.model, **(options or {})}
        return lf.merge(self.paths, method, params={**FIXED, **params}, **options)

    def weights(self) -> dict[str, Tensor]:
        """(m, n) of every module."""
        return {n: (w.mT if type(m).__name__ == "Conv1D" else w) for n, m in self.modules.items() for w in [m.weight]}

    def axis(self, name: str, inputs: dict[str, Tensor]) -> Tensor | None:
        """The mask of a module's rows, by what is known of the family."""
        if self.family == "vit" or (self.family == "blip" and "crossattention" in name and "query" not in name):
            return None
        decoder = name.startswith("decoder.") and not name.endswith("EncDecAttention.v")
        return inputs["decoder_attention_mask" if decoder else "attention_mask"].bool().flatten()


@pytest.fixture(scope="module")
def bench_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def of(family: str) -> Bench:
        if family not in made:
            made[family] = Bench(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture
def bert(bench_of: Callable[[str], Bench]) -> Bench:
    return bench_of("bert")


@contextmanager
def installed(bench: Bench, deltas: Deltas) -> Iterator[None]:
    """The model with these deltas added to its weights."""
    weights = bench.weights()
    before = {name: weights[name].clone() for name in deltas}
    with torch.no_grad():
        for name, delta in deltas.items():
            weights[name] += delta
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                weights[name].copy_(weight)


def rows(bench: Bench, task: int, deltas: Deltas) -> dict[str, np.ndarray]:
    """(S, n) counted input rows of every module, in order of first call, with these deltas installed."""
    inputs = bench.inputs[NAMES[task]]
    seen: dict[str, np.ndarray] = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            mask = bench.axis(name, inputs)
            seen[name] = (x if mask is None else x[mask]).numpy().copy()

        return hook

    handles = [m.register_forward_pre_hook(catch(n)) for n, m in bench.modules.items()]
    try:
        with installed(bench, deltas), torch.no_grad():
            bench.case.model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def brute_force(bench: Bench, solve: Callable[..., np.ndarray]) -> Deltas:
    """Modules in running order; `solve(X, Xt, deltas, W0)` sees task inputs and those of what is merged so far."""
    live = [rows(bench, i, bench.deltas[i]) for i in range(2)]
    merged: Deltas = {}
    for name in live[0]:
        now = [rows(bench, i, merged)[name] for i in range(2)]
        own = [d[name].numpy() for d in bench.deltas]
        found = solve([x[name] for x in live], now, own, bench.weights()[name].detach().numpy())
        merged[name] = torch.from_numpy(found)
    return merged


def deltas_of(result: Any) -> Deltas:
    return {name: pair.delta(torch.float64) for name, pair in result.modules.items()}


def distance(found: Deltas, want: Deltas) -> float:
    assert set(found) == set(want)
    away = sum(float((found[n] - want[n]).square().sum()) for n in want)
    return (away / sum(float(w.square().sum()) for w in want.values())) ** 0.5


def sequential(bench: Bench, **options: Any) -> Deltas:
    """The oracle's fixed point; with the full weight the delta is cut to R = 4 in the metric of the outputs."""
    settings = {"alpha_1": 1e-4, "alpha_2": 1e-4, **options}

    def solve(X: Any, Xt: Any, deltas: Any, W0: np.ndarray) -> np.ndarray:
        found = oracle.solve(X, Xt, deltas, W0=W0, **settings)
        if not settings.get("with_pretrain_matrix"):
            return found.W
        return oracle.truncate_output(found.W - W0, found.T2, 4)

    return brute_force(bench, solve)


# ---------------------------------------------------------------- against the brute force


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_every_family_equals_the_brute_force(family: str, bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of(family)
    found = bench.merge()
    assert found.report["iteris"]["verified"] == 0.0 and found.report["iteris"]["converged"] is True
    assert distance(deltas_of(found), sequential(bench)) < 1e-8


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"with_pretrain_matrix": 1}, {"with_pretrain_matrix": 1}),
        ({"with_pretrain_matrix": 1, "lambda_weight": "none", "reg_ceof": 0.3},
         {"with_pretrain_matrix": 1, "lam": "one", "reg_ceof": 0.3}),
        ({"reg_ceof": 0.5, "lambda_weight": "delta"}, {"reg_ceof": 0.5, "lam": "delta"}),
        ({"use_camr": True, "camr_alpha": 1e-3, "camr_beta": 1e-6},
         {"camr": oracle.Camr(1e-3, 1e-6)}),
        ({"use_camr": True, "camr_alpha": 1e-3, "camr_direction": "inverse", "camr_normalize": "max",
          "camr_cross": "iso"},
         {"camr": oracle.Camr(1e-3, 1e-8, "inverse", "max", "fro", "iso")}),
        ({"use_dcs": True, "dcs_min_ess": 0.5}, {"dcs": oracle.Dcs(1.0, 0.5)}),
        ({"use_dcs": True, "use_camr": True, "dcs_kernel": "excess", "dcs_min_ess": 0.25},
         {"dcs": oracle.Dcs(1.0, 0.25, "excess"), "camr": oracle.Camr(1e-4)}),
    ],
    ids=["full weight", "full weight, no lambda, rho", "delta lambda, rho", "camr", "inverse camr", "dcs",
         "dcs and camr"],
)  # fmt: skip
def test_every_switch_equals_the_brute_force(params: dict[str, Any], options: dict[str, Any], bert: Bench) -> None:
    found = deltas_of(bert.merge(**params))
    assert distance(found, sequential(bert, **options)) < 1e-7
    assert distance(found, sequential(bert)) > 1e-4, "the switch must matter, or the test shows nothing"


def test_weights_are_the_coefficients_of_the_tasks(bert: Bench) -> None:
    by_weights = bert.merge(options={"weights": [1.0, 0.25]})
    by_name = bert.merge(manual_ceof=(1.0, 0.25))
    assert by_weights.report["weights"] == by_name.report["weights"] == [1.0, 0.25]
    assert distance(deltas_of(by_weights), deltas_of(by_name)) == 0.0
    assert distance(deltas_of(by_weights), sequential(bert, c=[1.0, 0.25])) < 1e-8


@pytest.mark.parametrize("mats", [None, "layer", "global"])
@pytest.mark.parametrize("full", [0, 1])
def test_the_iteration_ends_where_the_sweep_does(mats: str | None, full: int, bert: Bench) -> None:
    mixing = {"use_mats": mats is not None, "mats_scope": mats or "layer", "mats_regularization": 1e-10}
    limit = bert.merge(with_pretrain_matrix=full)
    found = bert.merge("iteris", init="adapters", with_pretrain_matrix=full, **mixing)
    changes = [it["relative_change"] for it in found.report["iteris"]["iterations"]]
    assert found.report["iteris"]["converged"] is True and changes[-1] < 1e-10
    assert len(changes) > 3 and changes[1] > 1e-4, "modules must depend on each other, or the test shows nothing"
    assert distance(deltas_of(found), deltas_of(limit)) < 1e-8


def test_an_iteration_that_is_cut_short_says_so(bert: Bench) -> None:
    found = bert.merge("iteris", init="adapters", max_iter=2)
    assert len(found.report["iteris"]["iterations"]) == 2 and found.report["iteris"]["converged"] is False
    assert any("did not reach 1e-10 in 2 solves" in w for w in found.report["warnings"])
    assert distance(deltas_of(found), deltas_of(bert.merge())) > 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)])
def test_the_base_may_run_in_another_dtype(dtype: str, tolerance: float, bert: Bench) -> None:
    """Sums and solves stay in float64: what is left is the rounding of the forward. The model is cast in place."""
    base = copy.deepcopy(bert.case.model)
    strong = {"alpha_1": 1e-3, "alpha_2": 1e-3}
    found = bert.merge(base_dtype=dtype, options={"base": base}, **strong)
    assert 0.0 < distance(deltas_of(found), deltas_of(bert.merge(**strong))) < tolerance
    assert {p.dtype for p in base.parameters()} == {getattr(torch, dtype)}
    assert found.report["iteris"]["verified"] == 0.0 and not base.training


# ---------------------------------------------------------------- RegMean and RegMean++


def textbook(X: list[np.ndarray], deltas: list[np.ndarray]) -> np.ndarray:
    """W = sum_i W_i G_i (sum_i G_i)^{-1}, each Gram with 1e-6 of its norm on its diagonal."""
    grams = [x.T @ x for x in X]
    grams = [g + 1e-6 * np.linalg.norm(g) * np.eye(len(g)) for g in grams]
    top = sum(d @ g for d, g in zip(deltas, grams, strict=True))
    return np.linalg.solve(sum(grams), top.T).T  # type: ignore[call-overload]


@pytest.mark.parametrize(("method", "own"), [("regmean", True), ("regmean-plus-plus", False)])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_regmean_is_the_textbook_formula(method: str, own: bool, family: str, bench_of: Callable[[str], Bench]) -> None:
    """RegMean takes each task model's own activations, RegMean++ those of the merged model, in order."""
    bench = bench_of(family)
    pins = {"alpha_1": 1e-6, "alpha_2": 1e-6, "lambda_weight": "none"}
    rest = {k: v for k, v in FIXED.items() if k not in ("init", "max_iter", "target")}
    options = {"base": bench.case.model, "calibration": bench.inputs}
    found = lf.merge(bench.paths, method, params={**rest, **pins}, **options)
    want = brute_force(bench, lambda X, Xt, deltas, W0: textbook(X if own else Xt, deltas))
    assert distance(deltas_of(found), want) < 1e-7
    other = brute_force(bench, lambda X, Xt, deltas, W0: textbook(Xt if own else X, deltas))
    assert distance(other, want) > 1e-3


# ---------------------------------------------------------------- searches and rank rules


def test_searched_parameters_come_from_the_grid_and_are_reported(bert: Bench) -> None:
    found = bert.merge(alpha_1="auto", alpha_2="auto", reg_ceof="auto", folds=2)
    for layer in found.report["iteris"]["layers"]:
        assert layer["alpha"] in ALPHAS and layer["rho"] in RHOS
        assert np.isfinite(layer["heldout_gain"])
    assert json.dumps(found.report, allow_nan=False)
    assert found.report["iteris"]["verified"] == 0.0
    rho = bert.merge(reg_ceof="auto").report["iteris"]["layers"]
    assert all(layer["alpha"] == 1e-4 and layer["rho"] in RHOS for layer in rho)
    alpha = bert.merge(alpha_1="auto", alpha_2="auto").report["iteris"]["layers"]
    assert all(layer["alpha"] in ALPHAS and layer["rho"] == 0.0 for layer in alpha)
    assert all("heldout_gain" not in layer for layer in bert.merge().report["iteris"]["layers"])


def test_a_cut_in_the_metric_of_the_outputs_loses_less_of_them(bert: Bench) -> None:
    """At a module that the input feeds, where the features are known exactly: against the uncut solution's outputs."""
    name = "encoder.layer.0.attention.self.query"
    X = [rows(bert, i, bert.deltas[i])[name] for i in range(2)]
    own, W0 = [d[name].numpy() for d in bert.deltas], bert.weights()[name].detach().numpy()
    exact = oracle.solve(X, X, own, W0=W0, alpha_1=1e-4, alpha_2=1e-4)
    missed, away = {}, {}
    for metric in ("output", "frobenius"):
        cut = bert.merge(truncate_metric=metric, verify=False, options={"rank": 2})
        assert cut.modules[name].rank == 2
        E = deltas_of(cut)[name].numpy() - exact.W
        missed[metric], away[metric] = float(np.sum(E @ exact.T2 * E)), float(np.sum(E**2))
    assert missed["output"] < 0.95 * missed["frobenius"] and away["frobenius"] < 0.95 * away["output"]
    best = oracle.truncate_output(exact.W, exact.T2, 2) - exact.W
    assert missed["output"] == pytest.approx(float(np.sum(best @ exact.T2 * best)), rel=1e-6)


def test_kept_energy_is_that_of_the_cut(bert: Bench) -> None:
    found = bert.merge(truncate_metric="frobenius", verify=False, options={"rank": 2})
    name = "encoder.layer.0.attention.self.query"
    (row,) = [r for r in found.report["layers"] if r["module"] == name]
    full = torch.linalg.svdvals(deltas_of(bert.merge(verify=False))[name])
    assert row["kept_energy"] == pytest.approx(float(full[:2].square().sum() / full.square().sum()), rel=1e-8)
    assert row["rank"] == 2 and len(row["spectrum"]) == 2


# ---------------------------------------------------------------- encoder-decoder models


def spoken(bench: Bench, collect: str, **options: Any) -> Any:
    encoder = {n: {k: v for k, v in i.items() if not k.startswith("decoder_")} for n, i in bench.inputs.items()}
    bench.case.model.generation_config.eos_token_id = None
    bench.case.model.generation_config.pad_token_id = 0
    return bench.merge(inputs=encoder, collect=collect, max_new_tokens=4, **options)


def test_without_targets_each_task_model_speaks_once(bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("t5")
    calls, generate = [], bench.case.model.generate
    bench.case.model.generate = lambda **k: calls.append(k["input_ids"].shape[0]) or generate(**k)
    try:
        found = spoken(bench, "teacher-forced")
    finally:
        del bench.case.model.generate
    assert sum(calls) == 12, "every sample once, and never again for the merged model"
    tokens = {row["module"]: row["tokens"] for row in found.report["iteris"]["layers"]}
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == [6 * 4, 6 * 4]
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == [
        int(i["attention_mask"].sum()) for i in bench.inputs.values()
    ]
    assert found.report["iteris"]["verified"] == 0.0


@pytest.mark.parametrize(("collect", "counted"), [("generate-last", 1), ("prefill", 1)])
def test_what_a_decoder_counts(collect: str, counted: int, bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("t5")
    found = spoken(bench, collect)
    tokens = {row["module"]: row["tokens"] for row in found.report["iteris"]["layers"]}
    assert tokens["decoder.block.1.layer.0.SelfAttention.q"] == [6 * counted, 6 * counted]
    assert found.report["iteris"]["verified"] == 0.0


def test_the_three_ways_to_collect_differ(bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("t5")
    found = [deltas_of(spoken(bench, c, verify=False)) for c in ("teacher-forced", "generate-last", "prefill")]
    assert min(distance(found[0], found[1]), distance(found[0], found[2]), distance(found[1], found[2])) > 1e-4


def test_labels_and_decoder_inputs_are_one_thing(bench_of: Callable[[str], Bench]) -> None:
    bench = bench_of("t5")
    g = torch.Generator().manual_seed(8)
    by_labels, by_inputs = {}, {}
    for name, inputs in bench.inputs.items():
        encoder = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
        labels = torch.randint(3, 50, (6, 5), generator=g)
        shifted = torch.cat([torch.zeros(6, 1, dtype=torch.int64), labels[:, :-1]], dim=1)
        by_labels[name] = {**encoder, "labels": labels}
        by_inputs[name] = {**encoder, "decoder_input_ids": shifted, "decoder_attention_mask": torch.ones_like(shifted)}
    assert distance(deltas_of(bench.merge(inputs=by_labels)), deltas_of(bench.merge(inputs=by_inputs))) < 1e-12


def test_generate_last_is_refused_elsewhere(bert: Bench) -> None:
    with pytest.raises(LoraforgeError, match="encoder-decoder"):
        bert.merge(collect="generate-last")


# ---------------------------------------------------------------- modules that are used twice


class Tied(nn.Module):
    """One linear module at two depths, another one behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(40, 6)
        self.tied, self.top = nn.Linear(6, 6), nn.Linear(6, 5)
        self.config = SimpleNamespace(vocab_size=40, max_position_embeddings=64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        for _ in range(2):
            h = torch.tanh(self.tied(h)) + 0.5 * h
        return self.top(h)


@pytest.mark.parametrize("lam", ["full", "none"])
def test_a_shared_module_is_found_out_and_iterated_to_its_fixed_point(lam: str, tmp_path: Path) -> None:
    """Rows of both calls count, and the merged delta solves on the inputs that it itself makes: G(W) = W."""
    net, g = Tied().double(), torch.Generator().manual_seed(6)
    shapes = {"tied": (6, 2, 6), "top": (5, 2, 6)}
    paths, own = [], []
    for i, name in enumerate(NAMES):
        tensors = {k: 0.3 * v for k, v in folders.factors(shapes, seed=i).items()}
        paths.append(folders.write_folder(tmp_path / name, tensors, folders.config(r=2, lora_alpha=2, task_type=None)))
        low = {m: [tensors[f"{folders.PREFIX}{m}.lora_{s}.weight"].double() for s in "BA"] for m in shapes}
        own.append({m: (B @ A).numpy() for m, (B, A) in low.items()})
    inputs = {name: {"input_ids": torch.randint(1, 40, (12, 7), generator=g)} for name in NAMES}
    params = {**FIXED, "lambda_weight": lam, "max_iter": 60}
    found = lf.merge(paths, "iteris-plus", base=copy.deepcopy(net), calibration=inputs, params=params)
    account = found.report["iteris"]
    assert account["verified"] is None and account["converged"] is True
    assert len(account["iterations"]) > 2 and account["iterations"][-1]["relative_change"] < 1e-10
    assert json.dumps(found.report, allow_nan=False)

    def seen(deltas: dict[str, np.ndarray], task: int) -> dict[str, np.ndarray]:
        """Inputs of both modules, in numpy, all calls stacked."""
        W = {m: getattr(net, m).weight.detach().numpy() + deltas[m] for m in shapes}
        h, calls = net.embed(inputs[NAMES[task]]["input_ids"]).detach().numpy().reshape(-1, 6), []
        for _ in range(2):
            calls.append(h)
            h = np.tanh(h @ W["tied"].T + net.tied.bias.detach().numpy()) + 0.5 * h
        return {"tied": np.concatenate(calls), "top": h}

    merged = {m: d.numpy() for m, d in deltas_of(found).items()}
    for m in shapes:
        X = [seen(own[i], i)[m] for i in range(2)]
        Xt = [seen(merged, i)[m] for i in range(2)]
        W0 = getattr(net, m).weight.detach().numpy()
        want = oracle.solve_dense(
            X, Xt, [o[m] for o in own], W0=W0, lam="one" if lam == "none" else lam, alpha_1=1e-4, alpha_2=1e-4
        )
        np.testing.assert_allclose(merged[m], want, atol=1e-8)


# ---------------------------------------------------------------- the report


def test_phases_and_residuals(bert: Bench) -> None:
    report = bert.merge().report
    assert list(report["phases"]) == ["load base", "load data", "load adapters", "generate", "trace", "sweep", "verify"]
    assert 0 < sum(report["phases"].values()) <= report["seconds"]
    order = [row["module"] for row in report["iteris"]["layers"]]
    assert order == list(rows(bert, 0, {})), "in running order"
    for row in report["iteris"]["layers"]:
        assert 0.0 <= row["residual_after"] < row["residual_before"]
        assert row["condition"] >= 1.0 and row["solver"].startswith("cholesky") and len(row["lambda"]) == 2
        assert (row["sigma"], row["tau"], row["ess"]) == (None, None, None)
    assert [r["module"] for r in report["layers"]] == list(bert.merge().modules)
    iterated = bert.merge("iteris", init="adapters", max_iter=3).report
    assert list(iterated["phases"])[-1] == "iterate" and "verify" not in iterated["phases"]
    assert iterated["iteris"]["iterations"][0]["residual"] is None, "JSON has no NaN"


def test_sample_weights_are_reported(bert: Bench) -> None:
    report = bert.merge(use_dcs=True, dcs_min_ess=0.5).report
    assert json.dumps(report, allow_nan=False)
    for row in report["iteris"]["layers"]:
        assert row["sigma"] > 0 and row["tau"] >= 1 and 0.5 * (1 - 1e-6) <= row["ess"] <= 1.0


def test_few_tokens_are_a_warning_and_enough_are_not(bert: Bench) -> None:
    thin = [w for w in bert.merge(verify=False).report["warnings"] if "tokens a task" in w]
    assert len(thin) == 1 and f"{len(bert.modules)} of {len(bert.modules)} modules" in thin[0]
    assert "16 features" in thin[0] and f"first: {min(bert.modules)}, 32 tokens" in thin[0]
    g = torch.Generator().manual_seed(9)
    ids = {n: {"input_ids": torch.randint(3, 50, (16, 16), generator=g)} for n in NAMES}
    assert not any("tokens a task" in w for w in bert.merge(inputs=ids, verify=False).report["warnings"])


def test_progress_names_modules_in_running_order(bert: Bench) -> None:
    told: list[tuple[str, str]] = []
    bert.merge(options={"progress": lambda stage, detail, done, total: told.append((stage, detail))})
    order = list(rows(bert, 0, {}))
    assert told == [("solving", n) for n in order] + [("verifying", n) for n in order]


# ---------------------------------------------------------------- samples


def test_seeds_choose_samples(bert: Bench) -> None:
    def chosen(**options: Any) -> Deltas:
        return deltas_of(bert.merge(samples_num=3, verify=False, options=options))

    first = chosen(seed=1)
    assert distance(chosen(seed=1), first) == 0.0
    assert distance(chosen(seed=2), first) > 1e-6
    assert distance(chosen(seed=1, samples=3), first) == 0.0, "samples= is samples_num"
    report = bert.merge(options={"samples": 4, "seed": 7}, verify=False).report
    assert (report["params"]["samples_num"], report["params"]["seed"]) == (4, 7)
    assert [(c["name"], c["samples"], c["available"]) for c in report["calibration"]] == [("a", 4, 6), ("b", 4, 6)]


def test_calibration_by_order_and_by_name(bert: Bench) -> None:
    by_name = deltas_of(bert.merge(verify=False))
    turned = {name: bert.inputs[name] for name in reversed(NAMES)}
    assert distance(deltas_of(bert.merge(inputs=turned, verify=False)), by_name) == 0.0
    in_order = [bert.inputs[name] for name in NAMES]
    assert distance(deltas_of(bert.merge(inputs=in_order, verify=False)), by_name) == 0.0
    assert distance(deltas_of(bert.merge(inputs=in_order[::-1], verify=False)), by_name) > 1e-6


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "kind", "match", "part"),
    [
        ({"base": None}, LoraforgeError, "needs the base model", "--base"),
        ({"calibration": None}, LoraforgeError, "needs calibration data", "a=FILE, b=FILE"),
        ({"calibration": {}}, LoraforgeError, "needs calibration data", "a=FILE"),
        ({"calibration": {"a": 0}}, LoraforgeError, "number of calibration sets is wrong", "1 sets"),
        ({"calibration": [0, 0, 0]}, LoraforgeError, "number of calibration sets is wrong", "3 sets"),
        ({"calibration": {"a": 0, "bb": 0}}, UsageError, "names no adapter", "did you mean 'b'"),
        ({"base": nn.Linear(3, 3)}, LoraforgeError, "problems|no such module", "encoder.layer.0"),
        ({"weights": [1.0]}, LoraforgeError, "number of weights is wrong", "1 weights"),
        ({"weights": [1.0, float("nan")]}, LoraforgeError, "weight is not finite", "nan"),
        ({"params": {"alpha": 1}}, UsageError, "unknown parameter 'alpha'", "did you mean 'alpha_"),
        ({"params": {"max_iter": 0}}, UsageError, "'max_iter' is out of range", ">= 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refused(change: dict[str, Any], kind: type[LoraforgeError], match: str, part: str, bert: Bench) -> None:
    options = {"base": bert.case.model, "calibration": bert.inputs, "params": {"base_dtype": "float64"}, **change}
    if isinstance(options["calibration"], dict):
        options["calibration"] = {k: v or bert.inputs["a"] for k, v in options["calibration"].items()}
    elif isinstance(options["calibration"], list):
        options["calibration"] = [bert.inputs["a"] for _ in options["calibration"]]
    with pytest.raises(kind, match=match) as caught:
        lf.merge(bert.paths, "iteris-plus", **options)
    assert part in str(caught.value)


def test_inputs_that_the_model_does_not_take(bert: Bench) -> None:
    wrong = {n: {**i, "pixel_values": torch.zeros(6, 1, 8, 8)} for n, i in bert.inputs.items()}
    with pytest.raises(LoraforgeError, match="does not take 'pixel_values'") as caught:
        bert.merge(inputs=wrong)
    assert "input_ids" in str(caught.value.expected)


def test_a_dry_run_loads_no_factor_and_solves_nothing(bert: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraforge.merging import calibrated

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan solves nothing")

    monkeypatch.setattr(calibrated, "Engine", forbidden)
    dry = bert.merge(options={"dry_run": True})
    assert dict(dry.modules) == {} and len(dry.report["plan"]["modules"]) == len(bert.modules)
    assert json.dumps(dry.report, allow_nan=False)
    with pytest.raises(AssertionError, match="solves nothing"):
        bert.merge()
