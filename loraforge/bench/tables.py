"""The tables of a result: numbers in, headers and rows out. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
MEBI = 2**20


@dataclass(frozen=True, slots=True)
class Page:
    """One table.

    Attributes:
        title: A line above it.
        headers: Titles of the columns.
        rows: Cells; None for what was not measured.
        spare: Headers of the columns that a narrow terminal may do without, the first to go first.
    """

    title: str
    headers: list[str]
    rows: list[list[object]]
    spare: tuple[str, ...] = ()

    def without(self, names: Collection[str]) -> Page:
        """The page less some columns."""
        kept = [at for at, header in enumerate(self.headers) if header not in names]
        return Page(
            self.title, [self.headers[at] for at in kept], [[row[at] for at in kept] for row in self.rows], self.spare
        )


def pages(result: Row) -> list[Page]:
    """The tables of every group that was measured."""
    makers: dict[str, Callable[[Row, list[Row]], list[Page]]] = {
        "kernels": _kernels, "merge": _merge, "iteris": _iteris, "train": _train, "heads": _heads,
        "scale": _scale,
    }  # fmt: skip
    found = []
    for group in result["groups"]:
        rows = [row for row in result["rows"] if row["group"] == group]
        if rows:
            found += makers[group](result, rows)
    return found


def all_rows(result: Row) -> Page:
    """Every row with its spread, as the file has them."""
    headers = [
        "group", "case", "form", "ms", "IQR ms", "runs", "x peer", "peer", "GB/s", "GFLOP/s", "roofline %", "peak MiB",
        "error", "allowed",
    ]  # fmt: skip
    cells: list[list[object]] = [
        [
            row["group"], row["case"], row["form"], _ms(row), row["iqr"] * 1e3, row["runs"], row["speedup"],
            row["peer"], row["gb_per_s"], row["gflop_per_s"], _percent(row["roofline"]), _mebi(row["peak_bytes"]),
            row["error"], row["allowed"],
        ]
        for row in result["rows"]
    ]  # fmt: skip
    spare = ("allowed", "GFLOP/s", "GB/s", "peak MiB", "roofline %", "runs", "IQR ms", "group", "error")
    return Page("All timings", headers, cells, spare)


def comparison_page(comparison: Row) -> Page:
    """New over stored times, and what may be concluded."""
    rows: list[list[object]] = [
        [r["group"], r["case"], r["form"], r["seconds_old"] * 1e3, r["seconds_new"] * 1e3, r["ratio"], r["spread"],
         r["verdict"]]
        for r in comparison["rows"]
    ]  # fmt: skip
    headers = ["group", "case", "form", "stored ms", "now ms", "now / stored", "spread", "verdict"]
    return Page(f"Against {comparison['file']}", headers, rows, ("spread", "group", "stored ms"))


def heading(result: Row) -> list[str]:
    """Where, when and how it was measured."""
    machine = result["machine"]
    gpu = f", {machine['gpu']}" if result["device"].startswith("cuda") else ""
    plural = "" if machine["threads"] == 1 else "s"
    how = {
        "processor": "processor time of the process",
        "wall": "wall time",
        "events": "events of the GPU, caches overwritten before each call",
    }[result["clock"]]
    lines = [
        f"{machine['machine']}{gpu}, {machine['threads']} thread{plural}, torch {machine['torch']}",
        f"commit {machine['commit']}, {machine['date']}, {how}, medians; forms of a case in turn, each result compared",
    ]
    ceilings = result["ceilings"]
    if ceilings is not None:
        rates = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in ceilings["flops_per_second"].items())
        lines.append(f"ceilings: copy {ceilings['bytes_per_second'] / 1e9:.3g} GB/s; products, GFLOP/s: {rates}")
        lines.append(
            "roofline: share of the nearer ceiling; above 100 % in caches, or where the machine was slower just then"
        )
    return lines


def skipped_lines(result: Row) -> list[str]:
    """What was not measured, a line a reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for skipped in result["skipped"]:
        reasons.setdefault((skipped["form"], skipped["reason"]), []).append(skipped["case"])
    return [
        f"not measured: {form} of {len(cases)} case{'' if len(cases) == 1 else 's'} (first: {cases[0]}): {reason}"
        for (form, reason), cases in reasons.items()
    ]


def _by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["form"]] = row
    return found


def _kernels(result: Row, rows: list[Row]) -> list[Page]:
    ours = next((form for form in ("cuda", "cpu") if any(row["form"] == form for row in rows)), "cpu")
    headers = [
        "operator and size", "reference ms", "torch ms", f"{ours} ms", "x reference", "x torch", "GB/s", "GFLOP/s",
        "roofline %", "error",
    ]  # fmt: skip
    cells: list[list[object]] = []
    for case, forms in _by_case(rows).items():
        own = forms.get(ours)
        cells.append(
            [
                case, _ms(forms.get("reference")), _ms(forms.get("torch")), _ms(own),
                _times(forms.get("reference"), own), _times(forms.get("torch"), own),
                *((own[key] for key in ("gb_per_s", "gflop_per_s")) if own else (None, None)),
                _percent(own["roofline"]) if own else None, own["error"] if own else None,
            ]
        )  # fmt: skip
    title = f"Operators: compiled ({ours}) against PyTorch on {result['device']}; above x 1 the compiled form is faster"
    return [Page(title, headers, cells, ("GB/s", "GFLOP/s", "roofline %", "error", "reference ms", "torch ms"))]


def _merge(result: Row, rows: list[Row]) -> list[Page]:
    peers = [form for form in ("peft", "torch", "document") if any(row["form"] == form for row in rows)]
    sizes = " ".join(rows[0]["case"].removeprefix(rows[0]["op"]).split())
    headers = ["method", "loraforge ms", *(f"{p} ms" for p in peers), *(f"x {p}" for p in peers), "error"]
    cells: list[list[object]] = []
    for forms in _by_case(rows).values():
        own = forms["loraforge"]
        cells.append(
            [
                own["op"], _ms(own), *(_ms(forms.get(p)) for p in peers), *(_times(forms.get(p), own) for p in peers),
                own["error"],
            ]
        )  # fmt: skip
    title = f"Merges in memory: {sizes}, 2 adapters; above x 1 loraforge is faster"
    return [Page(title, headers, cells, ("error", *(f"{p} ms" for p in reversed(peers))))]


def _iteris(result: Row, rows: list[Row]) -> list[Page]:
    headers = ["side", "seconds", "IQR", "x document", "peak MiB", "objective", "error"]
    cells: list[list[object]] = [
        [r["form"], r["seconds"], r["iqr"], r["speedup"], _mebi(r["peak_bytes"]), r["objective"], r["error"]]
        for r in rows
    ]
    title = f"Calibrated merge beside the document's loop: {rows[0]['case']}; iteris-plus solves another problem"
    return [Page(title, headers, cells)]


def _train(result: Row, rows: list[Row]) -> list[Page]:
    """Averages and buffer beside loops and lists; the step beside plain replay, the switch as a share of a step."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row["op"], []).append(row)
    parts: list[list[object]] = []
    for forms in _by_case([row for op in ("ema", "buffer", "switch") for row in by_op.get(op, [])]).values():
        own, torch, peft = forms["loraforge"], forms.get("torch"), forms.get("peft")
        reference = forms.get("reference")
        parts.append(
            [own["case"], _ms(own), _times(reference, own), _times(torch, own), _times(peft, own),
             _mebi(own["peak_bytes"]), _mebi(torch["peak_bytes"]) if torch else None]
        )  # fmt: skip
    headers = ["part", "loraforge ms", "x names", "x torch", "x peft", "MiB held", "torch MiB"]
    found = [Page("I-LORA: its parts; above x 1 loraforge is faster", headers, parts)] if parts else []
    steps = {row["form"]: row for row in by_op.get("step", [])}
    if {"ilora", "replay"} <= steps.keys():
        switch = next((row for row in by_op.get("switch", []) if row["form"] == "loraforge"), None)
        ilora, replay = steps["ilora"], steps["replay"]
        share = None if switch is None else _percent(switch["seconds"] / max(ilora["seconds"], 1e-9))
        cells: list[list[object]] = [[_ms(replay), _ms(ilora), _times(ilora, replay), share]]
        headers = ["replay ms", "ilora ms", "ilora / replay", "switch % of a step"]
        found.append(Page(f"I-LORA: {ilora['case']}", headers, cells))
    return found


def _heads(result: Row, rows: list[Row]) -> list[Page]:
    """A line a form; the first form of a case is what the others are compared with."""
    cells: list[list[object]] = [
        [row["case"], row["form"], _ms(row), row["speedup"], row["peer"], row["error"]] for row in rows
    ]
    headers = ["what and size", "form", "ms", "x peer", "peer", "error"]
    title = (
        "Measuring heads: reference is whole passes (update: merging and subtracting); above x 1 faster than the peer"
    )
    return [Page(title, headers, cells, ("error",))]


def _scale(result: Row, rows: list[Row]) -> list[Page]:
    cells: list[list[object]] = []
    for forms in _by_case(rows).values():
        own, other = forms["loraforge"], forms.get("torch")
        axis = own["op"]
        cells.append([axis, own["size"][axis], _ms(own), _mebi(own["peak_bytes"]), _ms(other), _times(other, own)])
    headers = ["axis", "value", "loraforge ms", "peak MiB", "dense torch ms", "x torch"]
    fixed: dict[str, object] = {}
    for row in rows:
        if row["op"] != "tokens":
            fixed |= {name: value for name, value in row["size"].items() if name != row["op"] and name not in fixed}
    others = ", ".join(f"{name} {value}" for name, value in fixed.items())
    found = [Page(f"Scale: an svd merge (tokens: a sweep), one size at a time, the others at {others}", headers, cells)]
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for fit in result["fits"]:
        lines.setdefault((fit["axis"], fit["form"]), {})[fit["quantity"]] = fit
    exponents: list[list[object]] = [
        [axis, form, fits["seconds"]["points"], *_exponent(fits.get("seconds")), *_exponent(fits.get("peak_bytes"))]
        for (axis, form), fits in lines.items()
        if "seconds" in fits
    ]
    columns = ["axis", "form", "points", "time ~ axis^", "+- (time)", "memory ~ axis^", "+- (memory)"]
    return [*found, Page("Exponents of the range measured, with standard errors", columns, exponents)]


def _exponent(fit: Row | None) -> Sequence[float | None]:
    return (None, None) if fit is None else (fit["exponent"], fit["stderr"])


def _ms(row: Row | None) -> float | None:
    return None if row is None else row["seconds"] * 1e3


def _times(peer: Row | None, own: Row | None) -> float | None:
    return None if peer is None or own is None or own["seconds"] <= 0.0 else peer["seconds"] / own["seconds"]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _mebi(size: int | None) -> float | None:
    return None if size is None else size / MEBI
