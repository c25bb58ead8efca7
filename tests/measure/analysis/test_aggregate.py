"""heads.csv, stats.json and cases.json of a hand-written run, against plain loops."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from loraforge.errors import LoraforgeError, UsageError
from loraforge.measure.analysis.aggregate import aggregate
from loraforge.measure.analysis.joined import csv_text, join_heads, read_heads
from loraforge.measure.analysis.seeds_text import chance, number
from tests.measure.golden import HEADS, I_POST, I_PRE, UREL, G, U, document_lines, write_run

HEADER = "layer,head,I_pre,I_post,U,Urel,G,F,Ppred,Uq,Uk,Uv,Uo"
STATS = {
    "spearman_rho_Ipre_U", "spearman_rho_Ipre_Urel", "topk_overlap_Ipre_U", "topk_overlap_Ipre_Urel", "topk", "n_heads",
    "n_heads_Ipost", "topk_overlap_Ipre_Ipost", "spearman_rho_Ipost_U", "spearman_rho_Ipost_Urel",
    "spearman_rho_Ipost_G", "spearman_rho_Ipost_F", "spearman_rho_Ipost_Ppred", "n_important_but_static",
    "n_plastic_but_unimportant",
}  # fmt: skip


def read(path: Path) -> Any:
    """Strict JSON: NaN is refused."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest sorted values."""
    ordered, place = sorted(values), q / 100 * (len(values) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])


def top(values: list[float], k: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.mark.parametrize("profile", ["document", "seed"])
def test_the_documents_profile_writes_its_columns_and_keys_alone(run: Path, profile: Any) -> None:
    aggregate(run, topk=4, profile=profile)
    lines = (run / "heads.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == HEADER
    assert lines[1] == f"0,0,0.1,0.2,0.4,0.04,0.01,{0.01 * 0.01 * 2!r},0.5,0.2,0.2,0.2,0.2"
    assert len(lines) == 13
    assert set(read(run / "stats.json")) == STATS
    cases = read(run / "cases.json")
    assert set(cases) == {"important_but_static", "plastic_but_unimportant", "thresholds"}
    assert set(cases["thresholds"]) == {"I_pre_p90", "I_pre_p30", "Urel_p90", "Urel_p30"}
    for name in ("important_but_static", "plastic_but_unimportant"):
        assert cases[name] and all(list(case) == "layer head I_pre Urel U G Ppred".split() for case in cases[name])


def test_statistics_by_plain_loops(run: Path) -> None:
    stats = aggregate(run, topk=4)["stats"]
    squares = [g * g * 2 for g in G]
    expected = {
        "spearman_rho_Ipre_U": spearmanr(I_PRE, U).statistic,
        "spearman_rho_Ipre_Urel": spearmanr(I_PRE, UREL).statistic,
        "spearman_rho_Ipost_U": spearmanr(I_POST, U).statistic,
        "spearman_rho_Ipost_Urel": spearmanr(I_POST, UREL).statistic,
        "spearman_rho_Ipost_G": spearmanr(I_POST, G).statistic,
        "spearman_rho_Ipost_F": spearmanr(I_POST, squares).statistic,
        "topk_overlap_Ipre_U": len(top(I_PRE, 4) & top(U, 4)) / 4,
        "topk_overlap_Ipre_Urel": len(top(I_PRE, 4) & top(UREL, 4)) / 4,
        "topk_overlap_Ipre_Ipost": len(top(I_PRE, 4) & top(I_POST, 4)) / 4,
        "topk": 4,
        "n_heads": 12,
        "n_heads_Ipost": 12,
    }
    assert {key: stats[key] for key in expected} == pytest.approx(expected, abs=1e-14)
    # Ppred is 0.5 everywhere.
    assert stats["spearman_rho_Ipost_Ppred"] is None
    assert stats["rho"]["Ipost_Ppred"]["reason"] == "the second value is the same for all 12 heads"
    assert read(run / "stats.json") == json.loads(json.dumps(stats))


@pytest.mark.parametrize(("hi", "lo"), [(90, 30), (75, 50)], ids=["document", "wider"])
def test_cases_by_plain_loops(run: Path, hi: float, lo: float) -> None:
    found = aggregate(run, hi=hi, lo=lo)
    i_hi, i_lo, u_hi, u_lo = quantile(I_PRE, hi), quantile(I_PRE, lo), quantile(UREL, hi), quantile(UREL, lo)
    static = [HEADS[i] for i in range(12) if I_PRE[i] >= i_hi and UREL[i] <= u_lo]
    plastic = [HEADS[i] for i in range(12) if UREL[i] >= u_hi and I_PRE[i] <= i_lo]
    cases = found["cases"]
    assert [(c["layer"], c["head"]) for c in cases["important_but_static"]] == static
    assert [(c["layer"], c["head"]) for c in cases["plastic_but_unimportant"]] == plastic
    assert list(cases["thresholds"].values()) == pytest.approx([i_hi, i_lo, u_hi, u_lo])
    assert list(cases["thresholds"]) == [f"I_pre_p{hi}", f"I_pre_p{lo}", f"Urel_p{hi}", f"Urel_p{lo}"]
    important, still = sum(i >= i_hi for i in I_PRE), sum(u <= u_lo for u in UREL)
    chance = cases["expected"]["important_but_static"]
    assert chance["expected"] == pytest.approx(important * still / 12) and chance["observed"] == len(static)


def test_every_number_has_its_chance_level(run: Path) -> None:
    stats = aggregate(run, topk=4)["stats"]
    null = stats["null"]
    assert null["overlap_expected"] == 4 / 12 and null["draws"] == 10_000
    assert null["rho95"] == stats["rho"]["Ipre_U"]["rho95"]
    assert set(null["p_perm"]) == set(stats["rho"]) >= {"Ipre_Urel", "Ipost_G", "Ipre_Uo", "Ipre_Ipost", "U_Ppred"}
    assert all(p is None or 0 < p <= 1 for p in null["p_perm"].values())
    assert set(stats["overlap"]["Ipre_U"]) == {"overlap", "hits", "k", "n", "expected", "range95", "p"}
    rho = stats["rho"]["Ipre_Urel"]
    assert rho["ci"][0] <= rho["rho"] <= rho["ci"][1] and rho["within_layer"]["layers"] == 3


def test_layers_and_components(run: Path) -> None:
    stats = aggregate(run)["stats"]
    assert [row["layer"] for row in stats["layers"]] == [0, 1, 2]
    middle = stats["layers"][1]
    assert middle["I_pre"] == pytest.approx(sum(I_PRE[4:8]) / 4)
    assert middle["U"] == pytest.approx(math.sqrt(sum(u * u for u in U[4:8])))
    assert middle["rho_Ipre_Urel"] == pytest.approx(spearmanr(I_PRE[4:8], UREL[4:8]).statistic)
    assert [row["part"] for row in stats["components"]] == list("qkvo")
    assert [row["share"] for row in stats["components"]] == pytest.approx([0.25] * 4)
    assert stats["components"][0]["relative"] is None  # the document's files have no base norms


def test_fewer_heads_than_k_cut_k(run: Path) -> None:
    found = aggregate(run)
    assert found["stats"]["topk"] == 12 and found["stats"]["topk_overlap_Ipre_U"] == 1
    assert any("K is 12" in note for note in found["notes"])


def test_the_documents_profile_tells_the_k_that_was_asked(run: Path) -> None:
    assert aggregate(run, profile="document")["stats"]["topk"] == 20
    assert json.loads((run / "stats.json").read_text())["topk"] == 20


def test_a_folder_that_is_not_there_is_named_itself(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="(?s)no such run.*nowhere$|(?s:no such run.*nowhere\n)"):
        aggregate(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("value", "told", "p"),
    [(3.99e-18, "0.000", "<0.001"), (-1e-5, "0.000", "<0.001"), (0.00617, "0.006", "0.006"), (-0.2, "-0.200", None),
     (None, "-", "-"), (7, "7", "7")],
    ids=["rounding", "negative rounding", "small", "negative", "none", "count"],
)  # fmt: skip
def test_numbers_have_the_same_decimals(value: float | None, told: str, p: str | None) -> None:
    assert number(value) == told
    assert p is None or chance(value) == p


def test_optional_files_may_be_missing(run: Path) -> None:
    (run / "importance_post.jsonl").unlink()
    (run / "gradfisher_pre.jsonl").unlink()
    found = aggregate(run, topk=4)
    assert found["stats"]["n_heads_Ipost"] == 0
    assert found["stats"]["spearman_rho_Ipost_G"] is found["stats"]["topk_overlap_Ipre_Ipost"] is None
    assert "Ipost_U" not in found["stats"]["rho"]
    assert sum("is missing" in note for note in found["notes"]) == 2
    row = next(csv.DictReader((run / "heads.csv").read_text(encoding="utf-8").splitlines()))
    assert row["I_post"] == row["G"] == "nan"


def test_required_files_that_are_missing_are_told_together(run: Path) -> None:
    (run / "importance_pre.jsonl").unlink()
    (run / "update.jsonl").unlink()
    with pytest.raises(LoraforgeError) as caught:
        aggregate(run)
    assert "importance_pre.jsonl" in str(caught.value) and "update.jsonl" in str(caught.value)
    assert not (run / "stats.json").exists()


def test_a_left_join_on_the_heads_of_importance(tmp_path: Path) -> None:
    files = document_lines()
    files["importance_pre.jsonl"].reverse()
    files["update.jsonl"] = files["update.jsonl"][1:] + [{"layer": 9, "head": 0, "U": 1.0, "more": "unknown"}]
    files["gradfisher_pre.jsonl"][2]["G"] = float("nan")
    heads = join_heads(write_run(tmp_path, files))
    assert [(key.layer, key.head) for key in heads.keys] == HEADS
    assert math.isnan(heads.columns["U"][0]) and heads.columns["U"][1] == U[1]
    assert math.isnan(heads.columns["G"][2])
    assert "update.jsonl lacks 1 of 12 heads" in heads.notes
    assert any("has 1 heads that importance_pre.jsonl lacks" in note for note in heads.notes)
    stats = aggregate(tmp_path)["stats"]
    assert stats["spearman_rho_Ipre_U"] == pytest.approx(spearmanr(I_PRE[1:], U[1:]).statistic)


def test_a_file_without_stacks_speaks_of_the_one_that_the_others_name(tmp_path: Path) -> None:
    files = document_lines()
    files["update.jsonl"] = [line | {"stack": "dec", "kind": "self"} for line in files["update.jsonl"]]
    heads = join_heads(write_run(tmp_path, files))
    assert {key.stack for key in heads.keys} == {"dec"} and heads.columns["U"].tolist() == U


def test_stacks_and_kinds_have_their_own_statistics(tmp_path: Path) -> None:
    files = {}
    for name, lines in document_lines().items():
        files[name] = [line | {"stack": stack, "kind": "self"} for stack in ("dec", "enc") for line in lines]
        files[name] += [line | {"stack": "dec", "kind": "cross", "U": 1.0 - line.get("U", 0)} for line in lines]
    found = aggregate(write_run(tmp_path, files), topk=4)
    assert found["heads"] == 36 and list(found["stats"]["groups"]) == ["enc/self", "dec/self", "dec/cross"]
    groups = found["stats"]["groups"]
    assert groups["enc/self"]["spearman_rho_Ipre_U"] == pytest.approx(spearmanr(I_PRE, U).statistic)
    assert groups["dec/cross"]["spearman_rho_Ipre_U"] == pytest.approx(-spearmanr(I_PRE, U).statistic)
    assert groups["dec/cross"]["null"]["overlap_expected"] == 4 / 12
    with pytest.raises(LoraforgeError, match="cannot tell these heads apart"):
        aggregate(tmp_path, profile="document")


def test_constant_columns_are_null_with_a_reason(tmp_path: Path) -> None:
    files = document_lines()
    files["update.jsonl"] = [line | {"U": 0.0, "Urel": 0.0} for line in files["update.jsonl"]]
    found = aggregate(write_run(tmp_path, files))
    assert found["stats"]["spearman_rho_Ipre_U"] is None
    assert "U is 0 for all heads: it has no rank correlation" in found["notes"]
    read(tmp_path / "stats.json")


def test_strict_wants_intervals_above_zero(tmp_path: Path) -> None:
    with pytest.raises(LoraforgeError, match="--strict needs the intervals"):
        aggregate(write_run(tmp_path), strict=True)
    files = document_lines()
    for line in files["importance_pre.jsonl"]:
        line |= {
            "ci_lo": line["I"] - (0.1 if (line["layer"], line["head"]) != (2, 0) else 0.9),
            "ci_hi": 9.0,
            "se": 0.1,
        }
    write_run(tmp_path, files)
    loose, strict = aggregate(tmp_path), aggregate(tmp_path, strict=True)
    assert [(c["layer"], c["head"]) for c in loose["cases"]["important_but_static"]] == [(2, 0)]
    assert strict["cases"]["important_but_static"] == []
    assert strict["cases"]["plastic_but_unimportant"] == loose["cases"]["plastic_but_unimportant"]


def test_the_table_reads_back_and_repeats_byte_for_byte(run: Path) -> None:
    aggregate(run)
    names = ("heads.csv", "stats.json", "cases.json")
    first = [(run / name).read_bytes() for name in names]
    assert csv_text(read_heads(run / "heads.csv")).encode() == first[0]
    aggregate(run)
    assert [(run / name).read_bytes() for name in names] == first
    assert first[0].decode().splitlines()[0].startswith(HEADER + ",stack,kind,I_pre_se,")
    for name in ("importance_pre", "importance_post", "gradfisher_pre", "update"):
        (run / f"{name}.jsonl").unlink()
    assert csv_text(join_heads(run)).encode() == first[0]


def test_settings_and_values_out_of_range(run: Path) -> None:
    with pytest.raises(UsageError, match="topk"):
        aggregate(run, topk=0)
    with pytest.raises(UsageError, match="percentiles"):
        aggregate(run, hi=20, lo=30)
    (run / "update.jsonl").write_text('{"layer": 0, "head": 0, "U": "much"}\n', encoding="utf-8")
    with pytest.raises(LoraforgeError, match="no number"):
        aggregate(run)
    (run / "heads.csv").write_text("layer,I_pre\n1,2\n", encoding="utf-8")
    with pytest.raises(LoraforgeError, match="table of heads"):
        read_heads(run / "heads.csv")
    (run / "importance_pre.jsonl").write_text("", encoding="utf-8")
    (run / "update.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(LoraforgeError, match="no head"):
        aggregate(run)
