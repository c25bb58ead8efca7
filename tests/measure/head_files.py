"""Folders of measured runs as the measurements leave them, from the rows that the reports' tests are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.report.heads_material import make_heads, make_spectrum


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_measurements(
    folder: Path, method: str = "FFT", *, seed: int = 0, layers: int = 3, heads: int = 8, extras: bool = True
) -> list[dict[str, Any]]:
    """Lines of importance, Fisher and update of a run; with `extras` the optional files too. Returns the rows."""
    folder.mkdir(parents=True)
    rows = make_heads(layers, heads, seed, method)
    for phase in ("pre", "post"):
        name = f"I_{phase}"
        lines = [
            {"layer": r["layer"], "head": r["head"], "I": r[name], "loss_base": 0.7, "loss_ablate": None, "n": 64,
             "ci_lo": r[f"{name}_lo"], "ci_hi": r[f"{name}_hi"]}
            for r in rows if r[name] is not None
        ]  # fmt: skip
        if phase == "pre" or extras:
            write_lines(folder / f"importance_{phase}.jsonl", lines)
            about = {"objective": "task", "method": "exact", "n": 64}
            (folder / f"importance_{phase}.meta.json").write_text(json.dumps(about), encoding="utf-8")
    update = ("layer", "head", "U", "Urel", "Uq", "Uk", "Uv", "Uo", "nq", "nk", "nv", "no", "Urel_l2")
    write_lines(folder / "update.jsonl", [{key: row[key] for key in update} for row in rows])
    if extras:
        fisher = ("layer", "head", "G", "F", "Ppred")
        write_lines(folder / "gradfisher_pre.jsonl", [{key: row[key] for key in fisher} for row in rows if row["G"]])
        spectrum = [
            {k: v for k, v in x.items() if k not in ("layer", "part", "module")}
            | {"module": f"bert.encoder.layer.{x['layer']}.attention.{_NAMES[x['part']]}"}
            for x in make_spectrum(layers, 4, seed)
        ]  # fmt: skip
        write_lines(folder / "spectrum.jsonl", spectrum)
        path = {
            "steps": [0, 8, 64],
            "total": {"U": [0.0, 0.5, 1.0], "half_step": 8.0},
            "rank_correlation": [None, 0.6, 1.0],
        }
        (folder / "path.json").write_text(json.dumps(path), encoding="utf-8")
        ways = [{"layer": r["layer"], "head": r["head"], "U": [0.0, 0.3 * r["U"], r["U"]]} for r in rows]
        write_lines(folder / "path.jsonl", ways)
        record = {"method": method, "task": "rte", "seed": seed, "rank": 4 if method == "LoRA" else None,
                  "base_sha256": "ab" * 32, "theta0_sha256": "cd" * 32, "data": {"sha256": "ef" * 32},
                  "command": "loraforge measure run RUN", "versions": {"torch": "2"}}  # fmt: skip
        (folder / "run_config.json").write_text(json.dumps(record), encoding="utf-8")
    return rows


_NAMES = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
