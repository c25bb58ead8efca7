"""What the numbers about heads say in plain sentences, each beside what chance gives; and what they do not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraforge.report.heads_axes import signed
from loraforge.report.tables import format_cell, present

Content = Mapping[str, Any]
# Pair -> what is compared, and what a relation would say of the heads.
_WORDS = {
    "Ipre_Urel": ("importance before training and relative update", "were more important before training", "changed"),
    "Ipre_U": ("importance before training and update", "were more important before training", "changed"),
    "Ipost_U": ("importance after training and update", "are more important after training", "changed"),
}
CAVEATS = (
    "Importance before training is taken on the model that training started from. With the objective “task” its "
    "classifier is still random, so these numbers hold the noise of that classifier as well as the task; the objective "
    "“probe” trains the classifier first, “kl” needs none.",
    "Chance level: grey bands hold 95 % of what independent columns would give. With several statistics on a page, "
    "about one in twenty is outside its band by chance.",
    "Importance and update both change with depth. A correlation over all heads can come from depth alone; the "
    "within-layer column of the table holds depth fixed.",
    "A head is switched off alone. Heads that stand in for one another look unimportant one by one.",
    "Importance is not prunability: Budhraja et al. found that heads pruned at random often do as well once the model "
    "is fine-tuned again.",
    "That unimportant heads move, or important ones stay, is a hypothesis about learning. These numbers describe one "
    "training and do not show what would happen if a head were frozen.",
)


def verdict(content: Content) -> str:
    """The first finding in one sentence: importance before training against the relative update."""
    found = relation(content, "Ipre_Urel") or relation(content, "Ipre_U")
    return found or "Importance and update could not be compared."


def relation(content: Content, key: str) -> str:
    """A rank correlation in words, beside its chance band; empty where it is undefined."""
    entry = content["rho"].get(key) or {}
    rho: Any = entry.get("rho")
    band: Any = entry.get("rho95") or content["null"].get("rho95")
    if not present(rho):
        return ""
    pair, heads, what = _WORDS[key]
    count = entry.get("n") or content["stats"].get("n_heads")
    number = f"ρ = {signed(rho)}"
    if not present(band):
        return f"Between {pair}: {number}."
    number = f"{number}; chance alone stays within ±{band:.2f} for {count} heads"
    if abs(rho) <= band:
        return f"No relation beyond chance between {pair}: {number}."
    return f"Heads that {heads} {what} {'more' if rho > 0 else 'less'}: {number}."


def findings(content: Content) -> list[str]:
    """Overlaps, cases and the relation after training, each with its chance level."""
    stats, null = content["stats"], content["null"]
    told = []
    overlap, k = stats.get("topk_overlap_Ipre_Urel"), stats.get("topk")
    if overlap is not None and present(overlap) and k:
        chance = ""
        if all(present(null.get(f"overlap_{name}")) for name in ("expected", "lo", "hi")):
            low, high = (round(k * null[end]) for end in ("overlap_lo", "overlap_hi"))
            chance = f"; chance expects {k * null['overlap_expected']:.1f} (95 %: {low} to {high})"
        same = round(k * overlap)
        told.append(f"Of the {k} most important and the {k} most changed heads {same} are the same{chance}.")
    told += [case for name in ("important_but_static", "plastic_but_unimportant") if (case := _cases(content, name))]
    told += [found for found in (relation(content, "Ipost_U"),) if found]
    return told


def _cases(content: Content, name: str) -> str:
    count, chance = content["stats"].get(f"n_{name}"), content["null"]["cases"].get(name) or {}
    if count is None:
        return ""
    words = name.replace("_", " ")
    said = f"{count} head{'s' if count != 1 else ''} {'is' if count == 1 else 'are'} {words}"
    if not present(chance.get("expected")):
        return f"{said}."
    low, high = chance["lo"], chance["hi"]
    beyond = "more than chance" if count > high else "fewer than chance" if count < low else "as many as chance gives"
    return f"{said}: {beyond} ({chance['expected']:.1f} expected, 95 %: {low:.0f} to {high:.0f})."


def warnings(content: Content) -> list[str]:
    """What a reader must know before any number: notes of the files, what is missing, a random classifier."""
    pre = content["importance"].get("pre") or {}
    settings = pre.get("settings")
    objective = pre.get("objective") or (settings.get("objective") if isinstance(settings, Mapping) else None)
    told = [CAVEATS[0]] if objective == "task" else []
    return [*told, *content["notes"]]


def gone(content: Content, *files: str) -> list[str]:
    """Why a section has no picture: the sentences of the files that are missing."""
    return [content["missing"][file] for file in files if file in content["missing"]]


def hash_lines(hashes: Mapping[str, str]) -> str:
    """Digests as lines of text."""
    return "\n".join(f"{name:<24} {digest}" for name, digest in hashes.items())


def settings_lines(settings: Mapping[str, Any]) -> str:
    """Plain settings as lines of text; nested ones by dotted name."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            lines += [f"{key}.{line}" for line in settings_lines(value).splitlines()]
        elif not isinstance(value, list) or len(value) <= 12:
            lines.append(f"{key} = {format_cell(value)}")
        else:
            lines.append(f"{key} = ({len(value)} values)")
    return "\n".join(lines)
