"""What every row of METHODS must do. A new row is tested here without a word more: only what the row says is used.

Where a calibrated method is asked for an exact number, the parameters that are chosen by search, and those that depend
on the size of the deltas, are fixed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel

import loraforge as lf
from loraforge.adapters import open_adapter
from loraforge.errors import LoraforgeError, UsageError
from loraforge.merging.methods import METHODS, MethodRow, find_method
from tests.adapters import folders
from tests.calibrate import models

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Modules = dict[str, list[tuple[Tensor, Tensor]]]
SCALINGS = (1.5, 0.5, 2.0)
EXACT = {
    "alpha_1": 1e-4, "alpha_2": 1e-4, "reg_ceof": 0.0, "lambda_weight": "none", "use_camr": False, "use_dcs": False,
    "with_pretrain_matrix": 0, "use_mats": False, "base_dtype": "float64",
}  # fmt: skip
every_method = pytest.mark.parametrize("row", METHODS.values(), ids=list(METHODS))


def count_of(row: MethodRow) -> int:
    """Three adapters, or as many as the method takes."""
    return min(3, row.counts[1] or 3)


@dataclasses.dataclass
class Bench:
    """A tiny model, three adapters of two ranks in memory and on disk, and calibration inputs of each."""

    folder: Path
    case: models.Case
    adapters: Modules
    inputs: list[dict[str, Tensor]]
    made: int = 0
    kept: dict[Any, list[Path]] = dataclasses.field(default_factory=dict)
    whole: dict[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, row: MethodRow) -> Modules:
        """The adapters that a row can take: of one rank where it wants that."""
        if not row.equal_ranks:
            return self.adapters
        return {n: [(B[:, :2], A[:2]) for B, A in pairs] for n, pairs in self.adapters.items()}

    def paths(self, row: MethodRow) -> list[Path]:
        """Those adapters on disk, as many as the row takes, written once."""
        key = (row.equal_ranks, count_of(row))
        if key not in self.kept:
            self.kept[key] = self.write_all(row)
        return self.kept[key]

    def write(self, modules: Modules, index: int, dtype: torch.dtype = torch.float32, scaling: float = 1.0) -> Path:
        """One adapter of `modules` as a new folder; ranks by its factors, scaling by lora_alpha."""
        self.made += 1
        tensors, ranks = {}, {}
        for name, pairs in modules.items():
            B, A = pairs[index]
            tensors[f"{folders.PREFIX}{name}.lora_A.weight"] = A.to(dtype)
            tensors[f"{folders.PREFIX}{name}.lora_B.weight"] = B.to(dtype)
            ranks[name] = A.shape[0]
        targets = sorted({name.rsplit(".", 1)[-1] for name in modules})
        alphas = {name: r * scaling for name, r in ranks.items()}
        settings = folders.config(
            r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=alphas, target_modules=targets, task_type=None
        )
        return folders.write_folder(self.folder / f"made-{self.made}" / f"task{index}", tensors, settings)

    def write_all(self, row: MethodRow, modules: Modules | None = None, **options: Any) -> list[Path]:
        modules = modules or self.of(row)
        return [self.write(modules, i, scaling=SCALINGS[i], **options) for i in range(count_of(row))]

    def merge(self, row: MethodRow, paths: list[Path], params: dict[str, Any] | None = None, **options: Any) -> Any:
        """The merge with what this row needs and nothing else."""
        if row.needs == "calibration":
            known = {f.name for f in dataclasses.fields(row.params_class())}
            fixed = {k: v for k, v in EXACT.items() if k in known}
            if "max_iter" in known:  # enough for the two levels of this model
                fixed["max_iter"] = min(3, row.make_params().max_iter)
            inputs = options.pop("inputs", None) or self.inputs[: len(paths)]
            options |= {"base": self.case.model, "calibration": inputs, "params": fixed | (params or {})}
        elif params:
            options["params"] = params
        return lf.merge(paths, row.name, **options)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    g = torch.Generator().manual_seed(11)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                        max_position_embeddings=32)  # fmt: skip
    case = models.Case(BertModel(config).double().eval(), ("query", "value", "attention.output.dense"))
    for module in case.modules().values():
        module.weight.data *= 6.0  # initial weights are so small that later modules would hardly notice earlier ones
    adapters = {}
    for name, module in case.modules().items():
        m, n = module.weight.shape
        # Kept in float32, as files hold them: what is merged is then exactly what is compared with.
        adapters[name] = [
            (0.5 * torch.randn(m, r, generator=g) / r**0.5, 0.5 * torch.randn(r, n, generator=g) / n**0.5)
            for r in (2, 3, 2)
        ]
        # Tasks have something in common: a mean of deltas at right angles says little about any method.
        b, a = 0.5 * torch.randn(m, generator=g), 0.5 * torch.randn(n, generator=g) / n**0.5
        for B, A in adapters[name]:
            B[:, 0], A[0] = 0.4 * B[:, 0] + b, 0.4 * A[0] + a
    inputs = [models.inputs_of("bert", g, 6, 8) for _ in range(3)]
    return Bench(tmp_path_factory.mktemp("registry"), case, adapters, inputs)


@pytest.fixture
def paths(bench: Bench, row: MethodRow) -> list[Path]:
    return bench.paths(row)


@pytest.fixture(scope="module")
def merged(bench: Bench) -> Any:
    """The plain merge of each method, made once."""
    found: dict[str, Any] = {}

    def of(row: MethodRow) -> Any:
        if row.name not in found:
            found[row.name] = bench.merge(row, bench.paths(row))
        return found[row.name]

    return of


def deltas(result: Any) -> dict[str, Tensor]:
    return {name: pair.delta(torch.float64) for name, pair in result.modules.items()}


def own(bench: Bench, row: MethodRow, index: int) -> dict[str, Tensor]:
    return {n: SCALINGS[index] * p[index][0].double() @ p[index][1].double() for n, p in bench.of(row).items()}


def distance(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Relative Frobenius distance over all modules."""
    assert set(found) == set(want)
    away = sum(float((found[n] - want[n]).square().sum()) for n in want)
    return (away / sum(float(w.square().sum()) for w in want.values())) ** 0.5


def changed(modules: Modules, change: Any) -> Modules:
    return {n: [change(i, B, A) for i, (B, A) in enumerate(pairs)] for n, pairs in modules.items()}


# ---------------------------------------------------------------- the table


@every_method
def test_row_is_complete(row: MethodRow) -> None:
    for name in ("name", "title", "needs", "output", "cost", "paper", "params", "function"):
        assert isinstance(getattr(row, name), str) and getattr(row, name).strip(), name
    assert row.name == row.name.lower() and "_" not in row.name and " " not in row.name
    assert len(row.title.split()) <= 10
    assert row.needs in ("adapters", "calibration") and row.counts[0] >= 1
    assert row.default_weight in ("one", "mean") and row.default_rank in ("full", "max")
    assert row.survey is None or callable(row.load_survey())
    assert row.identical in ("sum", "mean", None) and (row.lone is not None or row.identical is None)
    assert callable(row.load_function())
    assert (row.load_function().__doc__ or "").strip() and METHODS[row.name] is row


@every_method
def test_parameters_are_a_frozen_dataclass_that_explains_itself(row: MethodRow) -> None:
    cls = row.params_class()
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    names = {f.name for f in dataclasses.fields(cls)}
    for f in dataclasses.fields(cls):
        assert str(f.metadata.get("help", "")).strip(), f"{f.name} has no help"
        assert f.default is not dataclasses.MISSING, f"{f.name} has no default"
        choices = f.metadata.get("choices")
        assert choices is None or f.default in choices, f.name
    assert set(row.defaults) <= names and set(row.lone or {}) <= names
    assert dataclasses.asdict(row.make_params()) == dataclasses.asdict(cls(**row.defaults))


def test_names_and_aliases_are_unique() -> None:
    words = [word for row in METHODS.values() for word in (row.name, *row.aliases)]
    assert len(words) == len(set(words))
    for word in words:
        assert word in (find_method(word).name, *find_method(word).aliases)


@every_method
def test_an_unknown_method_or_parameter_is_a_usage_error(row: MethodRow, bench: Bench, paths: list[Path]) -> None:
    typo = row.name[:-1] + "x"
    with pytest.raises(UsageError, match="unknown merge method") as caught:
        lf.merge(paths, typo)
    assert typo in str(caught.value) and row.name in str(caught.value)
    fields = dataclasses.fields(row.params_class())
    key = fields[0].name + "s" if fields else "density"
    with pytest.raises(UsageError, match=f"unknown parameter '{key}' of method '{row.name}'") as caught:
        bench.merge(row, paths, {key: 1})
    expected = f"did you mean '{fields[0].name}'" if fields else "has no parameters"
    assert expected in str(caught.value)


# ---------------------------------------------------------------- input


@every_method
@pytest.mark.parametrize(("value", "side"), [(float("nan"), 0), (float("inf"), 1)], ids=["NaN in B", "Inf in A"])
def test_a_factor_that_is_not_finite_names_file_and_key(row: MethodRow, value: float, side: int, bench: Bench) -> None:
    name = list(bench.adapters)[1]
    broken = changed(bench.of(row), lambda i, B, A: (B.clone(), A.clone()))
    broken[name][1][side][0, 1] = value
    paths = bench.write_all(row, broken)
    with pytest.raises(LoraforgeError, match="NaN or Inf") as caught:
        bench.merge(row, paths)
    key = f"{folders.PREFIX}{name}.lora_{'BA'[side]}.weight"
    assert str(paths[1] / "adapter_model.safetensors") in str(caught.value.where) and key in str(caught.value.where)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_adapters(row: MethodRow, dtype: torch.dtype, bench: Bench, tmp_path: Path) -> None:
    """They are read exactly, merged in float32 or float64, and written in their own dtype."""
    halves = bench.write_all(row, dtype=dtype)
    wide = bench.write_all(row, changed(bench.of(row), lambda i, B, A: (B.to(dtype).float(), A.to(dtype).float())))
    found = bench.merge(row, halves)
    assert distance(deltas(found), deltas(bench.merge(row, wide))) < 1e-6
    assert {f.dtype for p in found.modules.values() for f in (p.B, p.A)} <= {torch.float32, torch.float64}
    file = load_file(found.save(tmp_path / "out") / "adapter_model.safetensors")
    assert {t.dtype for t in file.values()} == {dtype}
    assert found.report["dtype"] == str(dtype).removeprefix("torch.") and 0 < found.report["rounding"] < 0.01


@every_method
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_output_dtype(row: MethodRow, dtype: str, bench: Bench, paths: list[Path], tmp_path: Path, merged: Any) -> None:
    found = bench.merge(row, paths, dtype=dtype)
    assert distance(deltas(found), deltas(merged(row))) == 0.0, "the dtype of the file changes no arithmetic"
    out = open_adapter(found.save(tmp_path / "out"))
    assert {out.info(m).dtype for m in out.modules} == {getattr(torch, dtype)}
    stored = {m: out.load(m).delta(torch.float64) for m in out.modules}
    assert distance(stored, deltas(found)) < {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}[dtype]


# ---------------------------------------------------------------- invariants


@every_method
def test_the_same_merge_gives_the_same_bytes(row: MethodRow, bench: Bench, paths: list[Path], tmp_path: Path) -> None:
    files = [bench.merge(row, paths).save(tmp_path / n) / "adapter_model.safetensors" for n in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


@every_method
def test_the_order_of_the_adapters_changes_nothing(row: MethodRow, bench: Bench, paths: list[Path]) -> None:
    order = [2, 0, 1] if len(paths) == 3 else [1, 0]
    weights = [0.7, 1.0, 0.4][: len(paths)]
    there = bench.merge(row, paths, weights=weights if row.weighted else None)
    inputs = [bench.inputs[i] for i in order] if row.needs == "calibration" else None
    extra = {"inputs": inputs} if inputs else {}
    back = bench.merge(
        row, [paths[i] for i in order], weights=[weights[i] for i in order] if row.weighted else None, **extra
    )
    assert distance(deltas(back), deltas(there)) < 1e-6
    if row.weighted:
        assert there.report["weights"] == weights
        equal = deltas(bench.merge(row, paths))
        assert distance(deltas(there), equal) > 1e-3, "weights must matter, or the test shows nothing"
    else:
        with pytest.raises(UsageError, match="takes no weights"):
            bench.merge(row, paths, weights=weights)


@every_method
def test_a_number_of_adapters_outside_the_limits_is_refused(row: MethodRow, bench: Bench, paths: list[Path]) -> None:
    fewest, most = row.counts
    if most is None:
        assert bench.merge(row, paths).report["modules"] == len(bench.adapters)
        return
    with pytest.raises(LoraforgeError, match="this number of adapters") as caught:
        bench.merge(row, [paths[0]] * (most + 1))
    assert f"{fewest} to {most}" in str(caught.value)


@every_method
def test_one_adapter_alone_is_returned_unchanged(row: MethodRow, bench: Bench, paths: list[Path]) -> None:
    """Under `lone`; a method without it flattens or prunes, and must do so."""
    away = distance(deltas(bench.merge(row, paths[:1], dict(row.lone or {}))), own(bench, row, 0))
    assert away > 1e-3 if row.lone is None else away < 1e-6


@every_method
def test_identical_adapters(row: MethodRow, bench: Bench, paths: list[Path]) -> None:
    """N copies give the adapter or N times it, as `identical` says."""
    found = bench.merge(row, [paths[1]] * len(paths), dict(row.lone or {}))
    assert [a["name"] for a in found.report["adapters"]] == ["task1", "task1-2", "task1-3"][: len(paths)]
    if row.identical is not None:
        times = float(len(paths)) if row.identical == "sum" else 1.0
        assert distance(deltas(found), {n: times * d for n, d in own(bench, row, 1).items()}) < 1e-6


@every_method
def test_only_the_product_of_the_factors_counts(row: MethodRow, bench: Bench, merged: Any) -> None:
    """(B, A) -> (c B, A / c), another c for each adapter; powers of two, so that files hold the same delta."""
    if not row.gauge:
        assert "factor" in row.title or "unit" in row.title, "a method that looks at the factors says so"
        return
    moved = changed(bench.of(row), lambda i, B, A: (B * 2.0 ** (i + 1), A / 2.0 ** (i + 1)))
    assert distance(deltas(bench.merge(row, bench.write_all(row, moved))), deltas(merged(row))) < 1e-6


@every_method
def test_scaling_all_deltas_scales_the_result(row: MethodRow, bench: Bench, merged: Any) -> None:
    """Everywhere where no calibration is involved.

    A calibrated solution is linear in the deltas for given features and weights, but features downstream depend on the
    deltas themselves: what holds is that modules fed by the model's input alone scale.
    """
    scaled = bench.write_all(row, changed(bench.of(row), lambda i, B, A: (4.0 * B, A)))
    found, before = deltas(bench.merge(row, scaled)), deltas(merged(row))
    if row.needs == "calibration":
        first = [n for n in before if n.endswith(("layer.0.attention.self.query", "layer.0.attention.self.value"))]
        assert len(first) == 2
        later = {n: d for n, d in before.items() if n not in first}
        assert distance({n: found[n] for n in later}, {n: 4.0 * d for n, d in later.items()}) > 1e-3
        found, before = {n: found[n] for n in first}, {n: before[n] for n in first}
    assert distance(found, {n: 4.0 * d for n, d in before.items()}) < 1e-6


# ---------------------------------------------------------------- missing modules


@pytest.fixture
def gaps(bench: Bench, row: MethodRow) -> tuple[str, list[Path], list[Path]]:
    """A module that the first adapter lacks; the same with a delta of zero there."""
    whole = bench.of(row)
    name = next(n for n in whole if n.endswith("query"))
    lacking = {n: p for n, p in whole.items() if n != name}
    zero = {n: [(B * (n != name or i != 0), A) for i, (B, A) in enumerate(p)] for n, p in whole.items()}

    def written(first: Modules) -> list[Path]:
        every = range(count_of(row))
        return [bench.write(first if i == 0 else whole, i, scaling=SCALINGS[i]) for i in every]

    return name, written(lacking), written(zero)


@every_method
def test_missing_as_zero(row: MethodRow, bench: Bench, gaps: tuple[str, list[Path], list[Path]]) -> None:
    name, lacking, zero = gaps
    found = bench.merge(row, lacking)
    assert name in found.modules
    assert distance(deltas(found), deltas(bench.merge(row, zero))) < 1e-6
    assert distance(deltas(bench.merge(row, lacking, on_missing="zero")), deltas(found)) == 0.0


@every_method
def test_missing_as_absent(row: MethodRow, bench: Bench, gaps: tuple[str, list[Path], list[Path]]) -> None:
    """With `present` the module is merged as if the adapters that lack it were not there; other modules do not move.

    The module here is fed by the model's input, so what a calibrated method does at it does not depend on the others.
    """
    name, lacking, _ = gaps
    # Over all modules together an adapter that is left out changes the others' thresholds too.
    alone = {"scope": "module"} if "scope" in {f.name for f in dataclasses.fields(row.params_class())} else {}
    found = deltas(bench.merge(row, lacking, alone, on_missing="present"))
    zero = deltas(bench.merge(row, lacking, alone))
    inputs = bench.inputs[1:] if row.needs == "calibration" else None
    extra = {"inputs": inputs} if inputs else {}
    want = deltas(bench.merge(row, lacking[1:], alone, **extra))[name]
    assert distance({name: found[name]}, {name: want}) < 1e-6
    if row.needs == "adapters":
        rest = [n for n in zero if n != name]
        assert distance({n: found[n] for n in rest}, {n: zero[n] for n in rest}) == 0.0


@every_method
def test_missing_refused(row: MethodRow, bench: Bench, gaps: tuple[str, list[Path], list[Path]]) -> None:
    name, lacking, zero = gaps
    with pytest.raises(LoraforgeError, match="missing from some adapters") as caught:
        bench.merge(row, lacking, on_missing="error")
    assert name in str(caught.value.where) and "task0" in str(caught.value.where)
    assert bench.merge(row, zero, on_missing="error").report["modules"] == len(bench.adapters)


# ---------------------------------------------------------------- ranks


@pytest.fixture
def narrow(bench: Bench, row: MethodRow) -> list[Path]:
    """Adapters of which one module has rank 1."""
    whole = bench.of(row)
    name = list(whole)[0]
    return bench.write_all(
        row, {n: [(B[:, :1], A[:1]) if n == name else (B, A) for B, A in p] for n, p in whole.items()}
    )


RULES: dict[str, dict[str, Any]] = {
    "rank": {"rank": 2},
    "max-rank": {"max_rank": 3},
    "energy": {"energy": 0.6},
    "energy between clamps": {"energy": 0.99, "max_rank": 4, "min_rank": 2},
    "nuclear": {"nuclear": 0.7},
    "ratio": {"ratio": 1.5},
    "Frobenius error": {"fro_error": 0.5},
}
# For methods whose result has few directions (entry-wise on the factors, clusters of units).
FEW: dict[str, dict[str, Any]] = {name: rule for name, rule in RULES.items() if name != "energy between clamps"} | {
    "rank": {"rank": 1},
    "max-rank": {"max_rank": 1},
    "nuclear": {"nuclear": 0.4},
    "Frobenius error": {"fro_error": 0.95},
    "energy between clamps": {"energy": 0.99, "max_rank": 1},
}


def full_rank(bench: Bench, row: MethodRow, paths: list[Path]) -> int:
    """The largest rank that a result of this method can have here, from the merge that loses nothing."""
    return whole_of(bench, row, paths).report["rank_max"]


def whole_of(bench: Bench, row: MethodRow, paths: list[Path]) -> Any:
    """The merge with every direction that it has, made once a method."""
    if row.name not in bench.whole:
        bench.whole[row.name] = bench.merge(row, paths, rank=64)
    return bench.whole[row.name]


# Calibrated merges take seconds each and share the choice of a rank with all others: a few rules show that they use it.
CALIBRATED_RULES = ("rank", "energy", "energy between clamps")
row_and_rule = [
    pytest.param(row, name, id=f"{name}-{row.name}")
    for row in METHODS.values()
    for name in (RULES if row.needs == "adapters" else CALIBRATED_RULES)
]


@pytest.mark.parametrize(("row", "name"), row_and_rule)
def test_rank_rules_bound_the_rank(row: MethodRow, name: str, bench: Bench, paths: list[Path]) -> None:
    most = full_rank(bench, row, paths)
    rule = (RULES if most > 4 else FEW)[name]
    found = bench.merge(row, paths, **rule)
    ranks = {name: pair.rank for name, pair in found.modules.items()}
    assert all(rule.get("min_rank", 1) <= r <= rule.get("max_rank", rule.get("rank", most)) for r in ranks.values())
    if "rank" in rule:
        assert set(ranks.values()) == {rule["rank"]}
    assert found.report["rank_max"] == max(ranks.values())
    assert {layer["module"]: layer["rank"] for layer in found.report["layers"]} == ranks
    assert 0.0 < found.report["kept_energy"] < 1.0 and 0.0 < found.report["relative_error"] < 1.0
    if "fro_error" in rule:
        assert all(layer["relative_error"] <= rule["fro_error"] for layer in found.report["layers"])
    assert distance(deltas(found), deltas(whole_of(bench, row, paths))) > 1e-3


@every_method
def test_a_budget_is_kept_and_spent(row: MethodRow, bench: Bench, paths: list[Path]) -> None:
    """All modules share it; one more direction of the cheapest module would not fit, or all are there."""
    shapes = {n: p[0][0].shape[0] + p[0][1].shape[1] for n, p in bench.of(row).items()}
    least = sum(shapes.values())
    if row.needs == "calibration":
        with pytest.raises(UsageError, match="budget is for data-free methods"):
            bench.merge(row, paths, budget=least * 2)
        return
    found = bench.merge(row, paths, budget=least + 100)
    spent = sum(pair.rank * shapes[name] for name, pair in found.modules.items())
    assert spent == found.report["parameters"] <= least + 100
    whole = whole_of(bench, row, paths)
    open_modules = [n for n, pair in found.modules.items() if pair.rank < whole.modules[n].rank]
    assert not open_modules or spent + min(shapes[n] for n in open_modules) > least + 100
    with pytest.raises(LoraforgeError, match="budget") as caught:
        bench.merge(row, paths, budget=least - 1)
    assert str(least) in str(caught.value)


@every_method
def test_a_rank_that_is_too_large_loses_nothing_and_is_reported(
    row: MethodRow, bench: Bench, paths: list[Path]
) -> None:
    """At most R = sum r_i; more is clamped by module, and said."""
    more = whole_of(bench, row, paths)
    most = more.report["rank_max"]
    assert most <= sum(next(iter(bench.of(row).values()))[i][1].shape[0] for i in range(len(paths)))
    full = bench.merge(row, paths, rank=most)
    assert distance(deltas(more), deltas(full)) < 1e-6
    clamped = [w for w in more.report["warnings"] if "rank 64 clamped to" in w]
    assert len(clamped) == len(bench.adapters) and any(f"clamped to {most}" in w for w in clamped)
    assert not any(f"rank {most} clamped to {most}" in w for w in full.report["warnings"])


@every_method
def test_uniform_rank(row: MethodRow, bench: Bench, narrow: list[Path], tmp_path: Path) -> None:
    """One rank everywhere, zeros where it is more than a module has; the deltas do not move."""
    plain, uniform = bench.merge(row, narrow), bench.merge(row, narrow, uniform_rank=True)
    assert len({p.rank for p in plain.modules.values()}) > 1
    assert {p.rank for p in uniform.modules.values()} == {plain.report["rank_max"]}
    assert distance(deltas(uniform), deltas(plain)) < 1e-12
    config = json.loads((uniform.save(tmp_path / "out") / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == plain.report["rank_max"] and not config.get("rank_pattern")


# ---------------------------------------------------------------- on disk and in PEFT


def hidden(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@every_method
def test_peft_computes_what_dense_arithmetic_does(row: MethodRow, bench: Bench, merged: Any, tmp_path: Path) -> None:
    found = merged(row)
    out = found.save(tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(bench.case.model), out).eval()
    scales = [m.scaling["default"] for m in loaded.modules() if hasattr(m, "lora_A")]
    assert len(scales) == len(bench.adapters) and set(scales) == {1.0}
    dense = copy.deepcopy(bench.case.model)
    for name, delta in deltas(found).items():
        dense.get_submodule(name).weight.data += delta
    want = hidden(dense, bench.inputs[0])
    assert float((want - hidden(bench.case.model, bench.inputs[0])).abs().max()) > 1e-2
    assert float((hidden(loaded, bench.inputs[0]) - want).abs().max()) <= 1e-5


@every_method
def test_report_has_the_pinned_keys_and_is_json(row: MethodRow, bench: Bench, merged: Any, paths: list[Path]) -> None:
    report = merged(row).report
    pinned = {
        "out", "method", "params", "adapters", "modules", "rank_max", "parameters", "relative_error", "kept_energy",
        "seconds", "phases", "peak_rss_bytes", "device", "kernels", "warnings",
    }  # fmt: skip
    assert pinned <= set(report)
    assert json.loads(json.dumps(report, allow_nan=False))["method"] == row.name
    assert report["params"] == dataclasses.asdict(row.make_params(report["params"]))
    assert [set(a) for a in report["adapters"]] == [{"name", "path", "format", "sha256", "modules", "ranks"}] * len(
        paths
    )
    assert [a["path"] for a in report["adapters"]] == [str(p) for p in paths]
    ranks = [[pair[1].shape[0]] for pair in next(iter(bench.of(row).values()))]
    assert [a["ranks"] for a in report["adapters"]] == ranks[: len(paths)]
    assert report["modules"] == len(bench.adapters) == len(report["layers"])
    assert report["parameters"] == sum(p.B.numel() + p.A.numel() for p in merged(row).modules.values())
    assert report["phases"] and all(seconds >= 0 for seconds in report["phases"].values())
    assert 0 < sum(report["phases"].values()) <= report["seconds"]
    assert report["peak_rss_bytes"] > 2**20


@every_method
@pytest.mark.parametrize(
    "rule",
    [{}, {"rank": 2, "min_rank": 3}, {"min_rank": 5}, {"max_rank": 3}, {"rank": 50}, {"uniform_rank": True}],
    ids=str,
)
def test_a_dry_run_plans_the_ranks_of_the_merge(
    row: MethodRow, rule: dict[str, Any], bench: Bench, narrow: list[Path]
) -> None:
    planned = bench.merge(row, narrow, dry_run=True, **rule)
    assert dict(planned.modules) == {} and json.dumps(planned.report, allow_nan=False)
    plan = planned.report["plan"]
    assert plan["peak_bytes"] > 0 and plan["output_bytes"] > 0 and plan["steps"]
    real = bench.merge(row, narrow, **rule)
    ranks = {n: p.rank for n, p in real.modules.items()}
    foreseen = {r["module"]: r["rank_out"] for r in plan["modules"]}
    if any(r["at_most"] for r in plan["modules"]):
        foreseeable = row.post != "iso" and not row.own_rule and not {"seed", "density"} & set(planned.report["params"])
        assert not foreseeable, "only a spectrum, a draw or a threshold decides what cannot be foreseen"
        assert set(foreseen) == set(ranks) and all(ranks[n] <= foreseen[n] for n in ranks)
    else:
        assert foreseen == ranks
        assert plan["output_bytes"] == 4 * real.report["parameters"]
