"""A comparison in words: the document's sections, and findings that claim nothing within the range of chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraforge.measure.analysis.seeds_text import chance, markdown_table, number, span

_RHOS = {
    "rho(I_pre, U)": "spearman_rho_Ipre_U", "rho(I_pre, Urel)": "spearman_rho_Ipre_Urel",
    "rho(I_post, U)": "spearman_rho_Ipost_U", "rho(I_post, Urel)": "spearman_rho_Ipost_Urel",
    "rho(I_post, G)": "spearman_rho_Ipost_G",
}  # fmt: skip
_OVERLAPS = {
    "I_pre, U": "topk_overlap_Ipre_U", "I_pre, Urel": "topk_overlap_Ipre_Urel",
    "I_pre, I_post": "topk_overlap_Ipre_Ipost",
}  # fmt: skip
_COUNTS = {
    "important but static": "important_but_static", "plastic but unimportant": "plastic_but_unimportant",
}  # fmt: skip


def find_differences(content: Mapping[str, Any]) -> list[str]:
    """Findings, one sentence each.

    A correlation within its null band is called no relation beyond chance; one method is set before another only where
    the interval of their difference excludes 0, or one count of cases is outside its range by chance and the other not.

    Args:
        content: Of compare_metrics.json.
    """
    about = content["comparison"]
    names = about["names"]
    found = [_relation(name, content[name]) for name in names]
    for pair in about["pairs"]:
        found.append(_smaller_rho(pair))
        found.append(_more_cases(pair["a"], pair["b"], content))
        found += [_same_heads(pair, name, title) for name, title in _COLUMNS.items() if name in pair["between"]]
    return found


def sections(content: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[object]]]]:
    """Title, column titles and rows of each table of the summary."""
    about = content["comparison"]
    names, pairs = about["names"], about["pairs"]
    against = [f"|{p['a']} - {p['b']}|" for p in pairs]
    tables: list[tuple[str, list[str], list[list[object]]]] = []
    rows: list[list[object]] = [
        [title, *(number(content[name][key]) for name in names), *(_distance(p, key) for p in pairs),
         *(span(p["deltas"][key].get("ci")) for p in pairs)]
        for title, key in _RHOS.items()
    ]  # fmt: skip
    headers = ["Spearman rho", *names, *against, *(f"95 % of {p['a']} - {p['b']}" for p in pairs)]
    tables.append((f"Rank correlation (by chance within ±{number(about['rho95'])})", headers, rows))
    rows = [
        [title, *(number(content[name][key]) for name in names), *(_distance(p, key) for p in pairs)]
        for title, key in _OVERLAPS.items()
    ]
    expected = number(content[names[0]]["null"]["overlap_expected"])
    tables.append((f"Top-{about['topk']} overlap (by chance {expected})", ["top heads of", *names, *against], rows))
    rows = [
        [title, *(_count(content[name], key) for name in names), *(_distance(p, f"n_{key}") for p in pairs)]
        for title, key in _COUNTS.items()
    ]
    tables.append(("Counterexamples (in brackets: range by chance)", ["heads", *names, *against], rows))
    rows = [
        [f"{p['a']}, {p['b']}: {name}", number(c["rho"]), span(c["ci"]), f"±{number(c['rho95'])}", chance(c["p_perm"]),
         number(p["overlap"][name]["overlap"])]
        for p in pairs
        for name, c in p["between"].items()
    ]  # fmt: skip
    tables.append(
        ("The same heads?", ["both methods'", "rho", "95 %", "by chance", "p", f"top-{about['topk']} overlap"], rows)
    )
    return tables


def summary_text(content: Mapping[str, Any]) -> str:
    """compare_summary.txt."""
    title = _title(content)
    parts = [title, "=" * len(title), ""]
    for heading, headers, rows in sections(content):
        parts += [heading, "-" * len(heading), *_aligned([headers, *rows]), ""]
    parts += ["Sign of I_post", "--------------", *_signs(content), ""]
    parts += ["Findings", "--------", *(f"* {line}" for line in content["comparison"]["findings"])]
    if content["comparison"]["warnings"]:
        parts += ["", "Warnings", "--------", *(f"! {line}" for line in content["comparison"]["warnings"])]
    return "\n".join(parts) + "\n"


def summary_markdown(content: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    parts = [f"# {_title(content)}", ""]
    for heading, headers, rows in sections(content):
        table: list[Sequence[object]] = [headers, *rows]
        escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in table]
        parts += [f"## {heading}", "", *markdown_table(escaped[0], escaped[1:])]
    parts += ["## Sign of I_post", "", *(f"- {line}" for line in _signs(content)), ""]
    parts += ["## Findings", "", *(f"- {line}" for line in content["comparison"]["findings"]), ""]
    if content["comparison"]["warnings"]:
        parts += ["## Warnings", "", *(f"- {line}" for line in content["comparison"]["warnings"]), ""]
    return "\n".join(parts).rstrip() + "\n"


_COLUMNS = {"U": "update", "I_post": "importance after training"}


def _title(content: Mapping[str, Any]) -> str:
    about = content["comparison"]
    return f"{' against '.join(about['names'])}: {about['n_heads']} heads"


def _relation(name: str, stats: Mapping[str, Any]) -> str:
    """Whether importance and relative update of one method are related at all."""
    rho, band = stats["spearman_rho_Ipre_Urel"], stats["null"]["rho95"]
    if rho is None or band is None:
        return f"{name}: I_pre and Urel have no rank correlation."
    if abs(rho) <= band:
        return (
            f"{name}: no relation of I_pre and Urel beyond chance (|rho| {number(abs(rho))} within {number(band)});"
            " this agrees with 'importance is not plasticity' and does not prove it."
        )
    sign = "more" if rho > 0 else "less"
    return f"{name}: heads that are important before training move {sign} (rho {number(rho)}, beyond ±{number(band)})."


def _smaller_rho(pair: Mapping[str, Any]) -> str:
    """Which method separates importance and update more, if the difference is no chance."""
    a, b, delta = pair["a"], pair["b"], pair["deltas"]["spearman_rho_Ipre_Urel"]
    if delta["ci"] is None:
        return f"{a} and {b}: their rho(I_pre, Urel) cannot be compared."
    sizes = delta["size_ci"]
    if delta["beyond_chance"] and (sizes[0] > 0 or sizes[1] < 0):
        name = b if delta["size_difference"] > 0 else a
        return (
            f"{name} has the smaller |rho(I_pre, Urel)| (|difference| {number(abs(delta['difference']))}, 95 % "
            f"{span(delta['ci'])}): it supports 'importance is not plasticity' more."
        )
    if delta["beyond_chance"]:
        return f"{a} and {b}: rho(I_pre, Urel) differs (95 % {span(delta['ci'])}), its size |rho| not beyond chance."
    return f"{a} and {b}: no difference of rho(I_pre, Urel) beyond chance (95 % of it {span(delta['ci'])})."


def _more_cases(a: str, b: str, content: Mapping[str, Any]) -> str:
    """Which method has more counterexamples than chance gives, if one has and the other has not."""
    above = {name: [title for title, key in _COUNTS.items() if _is_above(content[name], key)] for name in (a, b)}
    more = [name for name in (a, b) if above[name]]
    if len(more) == 1:
        return f"{more[0]} has more counterexamples than chance gives ({', '.join(above[more[0]])}); the other has not."
    if len(more) == 2:
        return f"{a} and {b} both have more counterexamples than chance gives."
    return f"{a} and {b}: no more counterexamples than chance gives."


def _same_heads(pair: Mapping[str, Any], name: str, title: str) -> str:
    """Whether both methods rank the heads alike."""
    both, found = f"{pair['a']} and {pair['b']}", pair["between"][name]
    if found["rho"] is None:
        return f"{both}: their {title} has no rank correlation ({found['reason']})."
    if found["rho95"] is None or abs(found["rho"]) <= found["rho95"]:
        return f"{both}: they rank the heads by {title} alike no more than chance does (rho {number(found['rho'])})."
    how = "alike" if found["rho"] > 0 else "in opposite order"
    return f"{both}: they rank the heads by {title} {how} (rho {number(found['rho'])}, 95 % {span(found['ci'])})."


def _is_above(stats: Mapping[str, Any], key: str) -> bool:
    expected = stats["null"]["cases_expected"][key]
    return expected is not None and expected["observed"] > expected["range95"][1]


def _count(stats: Mapping[str, Any], key: str) -> str:
    """A count with its range by chance."""
    expected = stats["null"]["cases_expected"][key]
    if expected is None:
        return str(stats[f"n_{key}"])
    return f"{stats[f'n_{key}']} ({expected['range95'][0]} to {expected['range95'][1]})"


def _distance(pair: Mapping[str, Any], key: str) -> str:
    difference = pair["deltas"][key]["difference"]
    return number(None if difference is None else abs(difference))


def _signs(content: Mapping[str, Any]) -> list[str]:
    lines = []
    for pair in content["comparison"]["pairs"]:
        changes = pair["sign_changes"]
        lines.append(
            f"{pair['a']}, {pair['b']}: {changes['n']} of {changes['of']} heads change it,"
            f" {changes['both_significant']} of them beyond both intervals"
        )
    return lines


def _aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
