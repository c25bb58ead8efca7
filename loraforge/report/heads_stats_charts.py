"""The statistics of a run as bars on what chance gives: fig_stats and fig_Ipost_corrs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraforge.report.heads_axes import CASES, Bar, bars, looks, null_key, symmetric
from loraforge.report.plots import figure
from loraforge.report.tables import present

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Content = Mapping[str, Any]
RHO_PRE = (("Ipre_U", "ρ(I_pre, U)"), ("Ipre_Urel", "ρ(I_pre, Urel)"))
RHO_POST = tuple((f"Ipost_{key}", f"ρ(I_post, {key})") for key in ("U", "Urel", "G", "F", "Ppred"))
OVERLAPS = tuple(
    (f"topk_overlap_Ipre_{key}", f"I_pre & {name}") for key, name in (("U", "U"), ("Urel", "Urel"), ("Ipost", "I_post"))
)


def rho_bars(content: Content, pairs: Sequence[tuple[str, str]], look: tuple[str, str], prefix: str = "") -> list[Bar]:
    """Rank correlations (key, label) with their bands and, where known, their intervals."""
    found = []
    for key, label in pairs:
        entry = content["rho"].get(key) or {}
        band = entry.get("rho95") or content["null"].get("rho95")
        found.append(Bar(prefix + label, entry.get("rho"), (-band, band) if band else None, entry.get("ci"), look))
    return found


def overlap_bars(content: Content, look: tuple[str, str], prefix: str = "") -> list[Bar]:
    """Top-K overlaps with what chance gives."""
    found = []
    for key, label in OVERLAPS:
        own = (content["overlap"].get(key.removeprefix("topk_overlap_")) or {}).get("range95")
        low, high = own or (content["null"].get("overlap_lo"), content["null"].get("overlap_hi"))
        band = (float(low), float(high)) if low is not None and high is not None else None
        found.append(Bar(prefix + label, content["stats"].get(key), band, None, look))
    return found


def case_bars(content: Content, look: tuple[str, str], prefix: str = "") -> list[Bar]:
    """Numbers of cases with what chance gives."""
    found = []
    for name, (_, label) in CASES.items():
        chance = content["null"]["cases"].get(name) or {}
        band = (float(chance["lo"]), float(chance["hi"])) if present(chance.get("hi")) else None
        label = prefix + label.replace(" but ", "\nbut " if name == "important_but_static" else " but\n")
        found.append(Bar(label, content["stats"].get(f"n_{name}"), band, None, look))
    return found


def count_limits(rows: Sequence[Bar]) -> tuple[float, float]:
    """From 0 to beyond the largest count or band."""
    return 0, symmetric([*(bar.value for bar in rows), *(bar.null[1] for bar in rows if bar.null)], 4)[1]


@contextmanager
def stats_chart(content: Content) -> Iterator[Figure]:
    """fig_stats: rank correlations, top-K overlaps and numbers of cases, each on what chance alone would give."""
    look = looks([content.get("method")])[0]
    cases = case_bars(content, look)
    with figure(3.0, columns=3) as (drawn, (left, middle, right)):
        bars(left, rho_bars(content, RHO_PRE, look), (-1, 1))
        bars(middle, overlap_bars(content, look), (0, 1), ".2f")
        bars(right, cases, count_limits(cases), ".0f")
        left.set_title("rank correlation", fontsize=12)
        middle.set_title(f"overlap of the top {content['stats'].get('topk', '')}", fontsize=12)
        right.set_title("cases (heads)", fontsize=12)
        drawn.set_layout_engine("constrained", wspace=0.06)
        null_key(drawn)
        yield drawn


@contextmanager
def post_correlations_chart(content: Content) -> Iterator[Figure]:
    """fig_Ipost_corrs: importance after training against update, gradient, Fisher and prediction."""
    with figure(3.4) as (drawn, axes):
        bars(axes, rho_bars(content, RHO_POST, looks([content.get("method")])[0]), (-1, 1))
        axes.set_xlabel("Spearman's ρ over the heads")
        null_key(drawn)
        yield drawn
