from __future__ import annotations

from typing import Any

from loraforge.report.pipeline import (
    cross_table,
    merge_table,
    pipeline_report_html,
    score_table,
    stage_table,
    verdict,
)


def results(**changes: Any) -> dict[str, Any]:
    def row(name: str, kind: str, scores: list[float | None], **more: Any) -> dict[str, Any]:
        known = [score for score in scores if score is not None]
        mean = sum(known) / len(known) if len(known) == len(scores) else None
        return {"name": name, "kind": kind, "scores": scores, "intervals": [(0.1, 0.9), None], "mean": mean,
                "normalised": None, "bytes": None, **more}  # fmt: skip

    return {
        "name": "Mine", "description": "two <tasks>", "base": "b", "seed": 1, "inputs": "adapters",
        "tasks": [{"id": "x", "metric": "accuracy"}, {"id": "y", "metric": "mcc"}],
        "rows": [
            row("base", "base", [0.2, 0.1]),
            row("own adapters", "own", [0.9, 0.8]),
            row("x", "adapter", [0.9, 0.3]),
            row("y", "adapter", [None, 0.8]),
            row("svd", "merge", [0.5, 0.6], method="svd", rank=4, seconds=0.26, bytes=2048),
            row("ties", "merge", [0.7, 0.6], method="ties", rank=8, seconds=2.0, bytes=4096),
        ],
        "stages": [{"name": "train:x", "state": "skipped", "seconds": 3.14}],
        "command": "loraforge run Mine --set 'a=<b>'", "versions": {"torch": "2"},
        **changes,
    }  # fmt: skip


def test_scores_stand_with_intervals_and_the_best_merges_are_marked() -> None:
    table = score_table(results())
    assert table.headers == ("model", "x (accuracy)", "y (mcc)", "mean", "normalised")
    assert [row[0] for row in table.rows] == ["base", "own adapters", "svd", "ties"]
    assert table.rows[2] == ("svd", "0.500 [0.100, 0.900]", "0.600", "0.550", "–")
    # Ties of a column are all marked; rows that are no merge never are.
    assert table.best == {(3, 1), (2, 2), (3, 2), (3, 3)}


def test_of_a_perplexity_the_least_is_best() -> None:
    tasks = [{"id": "x", "metric": "perplexity", "lower_is_better": True}] * 2
    table = score_table(results(tasks=tasks))
    assert table.best == {(2, 1), (2, 2), (3, 2), (2, 3)}
    assert verdict(results(tasks=tasks)).startswith("Of 2 merges, svd has the best mean: 0.550.")


def test_the_verdict_names_the_best_merge_beside_the_others() -> None:
    assert verdict(results()) == (
        "Of 2 merges, ties has the best mean: 0.650. The adapters, each on its own task: 0.850. The base alone: 0.150."
    )
    assert verdict(results(rows=[])) == "Nothing could be measured."


def test_costs_crossings_and_stages() -> None:
    assert merge_table(results()).rows == (("svd", "svd", 4, "2.0 KiB", "0.3"), ("ties", "ties", 8, "4.0 KiB", "2.0"))
    assert cross_table(results()).rows == (("x", "0.900", "0.300"), ("y", "–", "0.800"))
    assert stage_table(results()).rows == (("train:x", "skipped", "3.1"),)


def test_the_page_is_whole_escaped_and_offline() -> None:
    page = pipeline_report_html(results())
    assert "two &lt;tasks&gt;" in page and "&#x27;a=&lt;b&gt;&#x27;" in page and "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    # A score outside of 0 to 1 has no place in the chart; the table stays.
    rows = [{**row, "scores": [-0.1, 2.0]} for row in results()["rows"]]
    assert "<svg" not in pipeline_report_html(results(rows=rows))
