"""The pictures of a run hold the numbers they were given, hide no sign and say what chance gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loraforge.report import heads_charts, heads_figures, heads_spectra_charts, heads_stats_charts
from loraforge.report.heads_axes import head_name, looks, place_labels, scale, signed
from loraforge.report.plots import figure
from tests.report.heads_material import make_run


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return make_run(3, 8)


def test_negative_correlations_are_on_the_axes(run: dict[str, Any]) -> None:
    content = run | {"rho": {key: entry | {"rho": -0.7} for key, entry in run["rho"].items()}}
    with heads_stats_charts.stats_chart(content) as drawn:
        axes = drawn.axes[0]
        assert axes.get_xlim() == (-1, 1)
        band, bar = axes.patches[0], axes.patches[1]
        assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx(
            (-run["null"]["rho95"], run["null"]["rho95"])
        )
        assert bar.get_width() == -0.7
        assert "−0.70" in {text.get_text() for text in axes.texts}
    with heads_stats_charts.post_correlations_chart(content) as drawn:
        assert drawn.axes[0].get_xlim() == (-1, 1) and len(drawn.axes[0].get_yticks()) == 5


def test_every_head_is_a_point_and_every_case_has_its_shape_and_name(run: dict[str, Any]) -> None:
    cases = {"important_but_static": run["heads"][:2], "plastic_but_unimportant": run["heads"][9:10]}
    content = run | {"cases": run["cases"] | cases}
    with heads_charts.importance_update_chart(content) as drawn:
        lines = {line.get_label(): line for line in drawn.axes[0].lines}
        counts = {label: len(line.get_xdata()) for label, line in lines.items() if not label.startswith("_")}
        assert counts == {"other heads": 21, "important but static": 2, "plastic but unimportant": 1}
        assert (
            lines["important but static"].get_marker() == "^" and lines["plastic but unimportant"].get_marker() == "s"
        )
        assert {text.get_text() for text in drawn.axes[0].texts} == {"L0H0", "L0H1", "L1H1"}
        assert "by chance within ±" in drawn.axes[0].get_title(loc="left")


def test_missing_heads_are_left_out_of_pairs_and_crossed_out_in_heatmaps(run: dict[str, Any]) -> None:
    with heads_charts.importance_gradient_chart(run) as drawn:
        points = [line for line in drawn.axes[0].lines if line.get_label() in ("other heads", *_cases())]
        assert sum(len(line.get_xdata()) for line in points) == 23
    with heads_figures.heatmap_chart(run, "G") as drawn:
        assert [text.get_text() for text in drawn.axes[0].texts].count("×") == 1


def _cases() -> list[str]:
    return ["important but static", "plastic but unimportant"]


def test_before_and_after_share_their_axes(run: dict[str, Any]) -> None:
    with heads_charts.before_after_chart(run) as drawn:
        axes = drawn.axes[0]
        assert axes.get_xlim() == axes.get_ylim() and axes.get_xscale() == axes.get_yscale()


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1.0, 2.0, -3.0], "linear"), ([1e-4, -2e-4, 0.5], "symlog"), ([1e-4, 2e-4, 0.5], "log"), ([0.0], "linear"),
     ([], "linear")],
    ids=["plain", "both signs", "positive", "zeros", "none"],
)  # fmt: skip
def test_scales_follow_the_tails(values: list[float], kind: str) -> None:
    with figure(2) as (_, axes):
        assert scale(axes, "x", values) == kind == axes.get_xscale()


def test_importance_diverges_around_zero_and_magnitudes_do_not(run: dict[str, Any]) -> None:
    with heads_figures.heatmap_chart(run, "I_pre") as drawn:
        mesh = drawn.axes[0].collections[0]
        assert mesh.get_cmap().name.startswith("PuOr") and mesh.norm.vmin == -mesh.norm.vmax
        assert len(drawn.axes[0].texts) == 24, "a number a head"
    with heads_figures.heatmap_chart(run, "U") as drawn:
        assert drawn.axes[0].collections[0].get_cmap().name.startswith("cividis")


def test_numbers_leave_cells_that_are_too_small() -> None:
    big = make_run(10, 16)
    with heads_figures.heatmap_chart(big, "U") as drawn:
        assert not drawn.axes[0].texts
    with heads_figures.heatmap_chart(big, "I_pre") as drawn:
        assert {text.get_text() for text in drawn.axes[0].texts} == {"−"}, "a minus tells the ends apart in print"


def test_stacks_get_a_panel_each(run: dict[str, Any]) -> None:
    decoder = [row | {"stack": "dec", "kind": kind} for kind in ("self", "cross") for row in run["heads"]]
    content = run | {"heads": [*run["heads"], *decoder]}
    with heads_figures.heatmap_chart(content, "U") as drawn:
        titles = [axes.get_title(loc="left") for axes in drawn.axes[:3]]
    assert titles == ["encoder", "decoder", "decoder, cross-attention"]
    assert head_name(decoder[-1], plain=False) == "dec cross L2H7" and head_name(decoder[-1]) == "L2H7"


def test_components_stack_to_the_squared_update(run: dict[str, Any]) -> None:
    with heads_figures.components_chart(run) as drawn:
        tops = [patch.get_y() + patch.get_height() for patch in drawn.axes[0].patches[-3:]]
        shares = [patch.get_y() + patch.get_height() for patch in drawn.axes[1].patches[-3:]]
    sums = [sum(row["U"] ** 2 for row in run["heads"] if row["layer"] == layer) for layer in range(3)]
    # Sums of the same squares in another order.
    assert tops == pytest.approx(sums, rel=1e-12) and shares == pytest.approx([1, 1, 1], rel=1e-12)


@pytest.mark.parametrize("ties", [False, True], ids=["plain", "ties"])
def test_every_head_is_in_exactly_one_decile(ties: bool) -> None:
    values = np.random.default_rng(3).normal(size=100)
    if ties:
        values[:40] = 0.0
    buckets = heads_figures.deciles(values.tolist())
    assert len(buckets) == 10 and sorted(i for bucket in buckets for i in bucket) == list(range(100))
    for low, high in zip(buckets, buckets[1:], strict=False):
        assert not low or not high or max(values[low]) < min(values[high])
    if not ties:
        assert [len(bucket) for bucket in buckets] == [10] * 10


def test_all_heads_reach_the_picture_of_deciles(run: dict[str, Any]) -> None:
    with heads_figures.bucket_chart(run) as drawn:
        dots = [line for line in drawn.axes[0].lines if line.get_marker() == "o"]
        assert sum(len(line.get_xdata()) for line in dots) == 24
        assert dots[0].get_xdata()[0] == 1 and dots[-1].get_xdata()[0] == 10


def test_spectra_and_paths_are_drawn(run: dict[str, Any]) -> None:
    with heads_spectra_charts.spectrum_chart(run) as drawn:
        assert len(drawn.axes[0].lines) == 12 and drawn.axes[0].get_ylim()[0] >= 1e-6
    path = {"steps": [0, 8, 64], "total": {"U": [0.0, 0.5, 2.0], "half_step": 20}, "rank_correlation": [None, 0.5, 1],
            "lines": [{"U": [0.0, 1.0, 2.0]}, {"U": [0.0, 0.0, 0.0]}]}  # fmt: skip
    with heads_spectra_charts.path_chart(run | {"path": path}) as drawn:
        total = next(line for line in drawn.axes[0].lines if line.get_label() == "all heads together")
        assert list(total.get_ydata()) == [0, 0.25, 1] and list(drawn.axes[1].lines[0].get_xdata()) == [8, 64]


def test_labels_do_not_hide_each_other() -> None:
    with figure(3) as (drawn, axes):
        axes.plot([0, 1], [0, 1], "o")
        wanted = [(0.5 + 0.001 * i, 0.5, f"L{i}H{i}") for i in range(6)]
        shown = place_labels(drawn, axes, wanted, [(x, y) for x, y, _ in wanted])
        drawn.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert shown == len(boxes) >= 4
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_methods_keep_their_colours() -> None:
    assert looks(["FFT", "LoRA"]) == [("#0072B2", "o"), ("#D55E00", "D")]
    assert looks(["LoRA-r8", "LoRA-r16", "FFT"])[1] == ("#009E73", "P")
    many = looks(["a", "b", "c", "d", "e"])
    assert len(set(many)) == 5 and not {"^", "s"} & {marker for _, marker in many}


def test_minus_is_a_minus() -> None:
    assert signed(-0.25) == "−0.25" and signed(None) == signed(float("nan")) == "–"
