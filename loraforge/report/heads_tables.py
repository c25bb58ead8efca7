"""Tables about heads: statistics beside chance, all heads, cases, components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraforge.report.heads_axes import CASES, head_name, is_plain
from loraforge.report.heads_charts import case_keys, head_key, known
from loraforge.report.tables import Table, present

Content = Mapping[str, Any]
_COLUMNS = ("I_pre", "I_post", "U", "Urel", "Urel_l2", "G", "F", "Ppred", "Uq", "Uk", "Uv", "Uo", "OV", "QK")
_ABOUT = (
    "Urel is U / (the sum of the norms of the four weights); Urel_l2 is U / (the root of the sum of their squares), "
    "the share by which the head's weights changed."
)
_ABOUT_SPECTRA = (
    "Means over the modules. Intruders: of the ten leading directions of the trained weights those whose cosine with "
    "every direction of the base is below 0.5; their number depends on that bound."
)


def statistics_table(content: Content) -> Table:
    """A row a pair of columns: rank correlation, interval, chance band, p, Kendall, depth held fixed."""
    rows = []
    for key, entry in content["rho"].items():
        if not present(entry.get("rho")):
            continue
        within = entry.get("within_layer") or {}
        ends = entry.get("ci") or (None, None)
        interval = f"{ends[0]:.2f} to {ends[1]:.2f}".replace("-", "−") if all(present(end) for end in ends) else None
        band, p = entry.get("rho95"), entry.get("p_perm")
        names = [{"Ipre": "I_pre", "Ipost": "I_post"}.get(name, name) for name in key.split("_", 1)]
        rows.append((
            " and ".join(names), f"{entry['rho']:+.3f}".replace("-", "−"), interval, f"±{band:.2f}" if band else None,
            f"{p:.4f}" if present(p) else None, _three(entry.get("kendall")), _three(within.get("rho")), entry.get("n"),
        ))  # fmt: skip
    headers = ("columns", "ρ", "95 % interval", "by chance", "p", "Kendall τ", "ρ within layers", "heads")
    return Table(headers, tuple(rows))


def heads_table(content: Content) -> Table:
    """A row a head with all that is known of it."""
    rows, plain, cases = content["heads"], is_plain(content["heads"]), case_keys(content)
    columns = [column for column in _COLUMNS if known(rows, column)]
    lines = tuple(
        (head_name(row, plain), *(row.get(column) for column in columns), _case_name(cases.get(head_key(row))))
        for row in rows
    )
    return Table(("head", *columns, "case"), lines, caption=_ABOUT if "Urel_l2" in columns else "")


def _case_name(name: str | None) -> str | None:
    return None if name is None else CASES[name][1]


def _three(value: float | None) -> str | None:
    return f"{value:+.3f}".replace("-", "−") if value is not None and present(value) else None


def _percent(value: float | None) -> str | None:
    return f"{value:.1%}" if value is not None and present(value) else None


def _short(value: float | None) -> str | None:
    return f"{value:.3g}".replace("-", "−") if value is not None and present(value) else None


def case_table(content: Content, name: str) -> Table:
    """The heads of one kind of case."""
    plain, columns = is_plain(content["heads"]), ("I_pre", "Urel", "U", "G", "Ppred")
    lines = content["cases"].get(name) or ()
    return Table(
        ("head", *columns), tuple((head_name(row, plain), *(_short(row.get(c)) for c in columns)) for row in lines)
    )


def components_table(content: Content) -> Table:
    """A row a projection: its update over all heads, and how it goes with importance."""
    headers = ("projection", "update", "share of U²", "relative", "ρ with I_pre", "ρ with I_post")
    rows = [
        (f"W_{line['part']}", line.get("U"), _percent(line.get("share")), _percent(line.get("relative")),
         _three(line.get("rho_Ipre")), _three(line.get("rho_Ipost")))
        for line in content["components"]
    ]  # fmt: skip
    return Table(headers, tuple(rows))


def intruders_table(content: Content) -> Table:
    """A row a part: modules, effective rank, intruder dimensions among the ten leading directions."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for line in content["spectrum"]:
        parts.setdefault(str(line.get("part") or "other"), []).append(line)
    rows = []
    for part, lines in parts.items():
        counts = [((line.get("n_intruder") or {}).get("k10") or {}).get("0.5") for line in lines]
        known_counts = [count for count in counts if count is not None]
        means = [_mean([line.get(key) for line in lines]) for key in ("eff_rank", "stable_rank", "rank_use")]
        rows.append((part, len(lines), *means, sum(known_counts) if known_counts else None))
    headers = ("projection", "modules", "effective rank", "stable rank", "share of the rank used", "intruders")
    return Table(headers, tuple(rows), caption=_ABOUT_SPECTRA)


def groups_table(content: Content) -> Table:
    """A row a stack and kind of attention, where a model has several."""
    keys = ("n_heads", "spearman_rho_Ipre_Urel", "spearman_rho_Ipost_U", "topk_overlap_Ipre_Urel")
    rows = tuple(
        (name, group.get(keys[0]), *(_three(group.get(key)) for key in keys[1:3]), group.get(keys[3]))
        for name, group in content["groups"].items()
    )
    return Table(("attention", "heads", "ρ(I_pre, Urel)", "ρ(I_post, U)", "top overlap"), rows)


def _mean(values: list[Any]) -> float | None:
    found = [float(value) for value in values if present(value)]
    return sum(found) / len(found) if found else None
