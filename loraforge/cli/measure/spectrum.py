"""`loraforge measure spectrum`: ranks of updates, and what they do to the base's directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output
from loraforge.cli.measure.update import HOW, Adapter, Base, Config, Final, HeadDim, Heads, KvHeads, check_one, option
from loraforge.errors import UsageError

# Thresholds of intruders, unless --eps adds one.
EPSILONS = (0.3, 0.5, 0.6, 0.7, 0.9)
KS = (1, 10, 20)

TopK = Annotated[
    int,
    option(HOW, "-k", "--top-k", text="Leading directions: counted for intruders, aligned with.", min=1,
           show_default="10"),
]  # fmt: skip
Eps = Annotated[
    float, option(HOW, "--eps", text="Intruders: cosine below this with every direction of W0.", show_default="0.5")
]
Intruders = Annotated[
    bool,
    option(HOW, "--intruders/--no-intruders", text="Decompose the base's weights too.", show_default="with --base"),
]
PerHead = Annotated[
    bool, option(HOW, "--per-head/--no-per-head", text="Also each head's own spectrum.", show_default="on")
]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", metavar="FILE.jsonl|DIR", help="Where to write.", show_default=False),
]


def spectrum(
    base: Base = None,
    adapter: Adapter = None,
    final: Final = None,
    config: Config = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    k: TopK = 10,
    eps: Eps = 0.5,
    intruders: Intruders = True,
    per_head: PerHead = True,
    out: Out = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Measure spectra, effective ranks and intruder dimensions of the update of every attention projection."""
    check_one(adapter=adapter, final=final)
    if not 0.0 < eps <= 1.0:
        raise UsageError("a cosine is out of range", where="--eps", got=eps, expected="above 0, at most 1")
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session(), voice.progress() as progress:
        from loraforge.measure.updates.spectra import measure_spectrum

        found = measure_spectrum(
            base, adapter=adapter, final=final, config=config, heads=heads, kv_heads=kv_heads, head_dim=head_dim, k=k,
            ks=sorted({*KS, k}), epsilons=sorted({*EPSILONS, eps}), intruders=intruders, per_head=per_head, out=out,
            overwrite=bool(overwrite), progress=progress,
        )  # fmt: skip
        voice.result(found)
        _print(voice, found, k, eps)


def _print(voice: Output, found: Mapping[str, Any], k: int, eps: float) -> None:
    """A row a module."""
    keys = ["rank", "stable_rank", "eff_rank", "rank_use", "rank90", "rank99"]
    headers = ["module", "largest", *(key.replace("_", " ") for key in keys)]
    rows = [[line["module"], line["sv"][0], *(line[key] for key in keys)] for line in found["lines"]]
    if found["meta"]["intruders"]:
        headers += [f"intruders of {k}", "alignment", "random", "amplification"]
        names = ("alignment", "alignment_random", "amplification")
        for row, line in zip(rows, found["lines"], strict=True):
            row += [line["n_intruder"][f"k{k}"][f"{eps:g}"], *(line[name] for name in names)]
    voice.table(headers, rows)
    if found["meta"]["intruders"]:
        voice.line(f"intruders: of the {k} leading directions, those with a cosine below {eps:g} to all of the base")
    elif found["meta"]["base"] is None:
        voice.note("note: intruders, alignment and amplification need the base: --base MODEL")
    for warning in found["meta"]["warnings"]:
        voice.note(f"warning: {warning}")
    for file in found["files"]:
        voice.line(f"written: {file}")
