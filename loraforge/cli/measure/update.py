"""`loraforge measure update`: how much each head was changed, from an adapter's factors or two full models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output
from loraforge.errors import UsageError

MODELS, HEADS, HOW = "What is compared", "Where the heads are, without --base", "How"
SHOWN = 10


def option(panel: str, *names: str, text: str, **more: Any) -> Any:
    """An option in a panel of the help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **{"show_default": False} | more)


Base = Annotated[
    str | None, option(MODELS, "--base", text="The start; with --adapter for relative numbers.", metavar="MODEL")
]
Adapter = Annotated[str | None, option(MODELS, "--adapter", text="Adapter, of any format.", metavar="DIR|FILE")]
Final = Annotated[str | None, option(MODELS, "--final", text="Fully fine-tuned model.", metavar="MODEL")]
Snapshots = Annotated[
    str | None, option(MODELS, "--snapshots", text="Snapshots of a run: the way of each head.", metavar="DIR")
]
Config = Annotated[
    str | None,
    option(HEADS, "--config", text="config.json of the base.", metavar="FILE",
           show_default="that of the base the adapter names"),
]  # fmt: skip
Heads = Annotated[int | None, option(HEADS, "--heads", text="Query heads of an attention.", min=1)]
KvHeads = Annotated[int | None, option(HEADS, "--kv-heads", text="Key-value heads of an attention.", min=1)]
HeadDim = Annotated[int | None, option(HEADS, "--head-dim", text="Rows a head.", min=1)]
Norm = Annotated[
    Literal["document", "l2", "seed"],
    option(HOW, "--norm", text="Relative update that is shown; files have both.", show_default="document"),
]
Scope = Annotated[
    Literal["heads", "all"],
    option(HOW, "--scope", text="all: also list every module outside the heads.", show_default="heads"),
]
Bias = Annotated[bool, option(HOW, "--bias", text="Add Ubq, Ubk, Ubv, changes of the biases; U stays.")]
KvShare = Annotated[
    bool,
    option(HOW, "--kv-share/--no-kv-share", text="Share key-value heads among their query heads.", show_default="on"),
]
Circuits = Annotated[
    bool,
    option(HOW, "--circuits/--no-circuits", text="Changes of OV and QK, where the base is given.", show_default="on"),
]
Spectrum = Annotated[bool, option(HOW, "--spectrum", text="Also what 'measure spectrum' writes.")]
Profile = Annotated[
    Literal["default", "document", "seed"],
    option(HOW, "--profile", text="document: exactly the document's columns.", show_default="default"),
]
Cache = Annotated[str | None, option(HOW, "--cache", text="Keeps the base's norms, by its hash.", metavar="FILE.json")]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", metavar="FILE.jsonl|DIR", help="Where to write.", show_default=False),
]


def update(
    base: Base = None,
    adapter: Adapter = None,
    final: Final = None,
    snapshots: Snapshots = None,
    config: Config = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    norm: Norm = "document",
    scope: Scope = "heads",
    bias: Bias = False,
    kv_share: KvShare = True,
    circuits: Circuits = True,
    spectrum: Spectrum = False,
    profile: Profile = "default",
    cache: Cache = None,
    out: Out = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Measure how much each attention head was changed; no model is loaded.

    An adapter is enough: its factors give the update exactly. With --base the update is also relative to the weights.
    """
    check_one(adapter=adapter, final=final, snapshots=snapshots)
    places: dict[str, Any] = dict(config=config, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session(), voice.progress() as progress:
        places |= dict(out=out, overwrite=bool(overwrite), progress=progress, kv_share=kv_share)
        if snapshots is not None:
            from loraforge.measure.updates.paths import measure_path

            way = measure_path(snapshots, base=base, **places)
            voice.result(way)
            _print_path(voice, way)
            return
        from loraforge.measure.updates.update import measure_update

        found = measure_update(
            base, adapter=adapter, final=final, norm=norm, scope=scope, bias=bias, circuits=circuits,
            spectrum=spectrum, profile=profile, cache=cache, **places,
        )  # fmt: skip
        voice.result(found)
        _print(voice, found)


def check_one(**models: str | None) -> None:
    """Refuses none or several of the fine-tuned models.

    Raises:
        UsageError: Naming the options.
    """
    given = [f"--{name}" for name, value in models.items() if value is not None]
    if len(given) != 1:
        expected = ", ".join(f"--{name}" for name in models)
        raise UsageError("name one fine-tuned model", got=" and ".join(given) or "none", expected=f"one of {expected}")


def _print(voice: Output, found: Mapping[str, Any]) -> None:
    """The heads that changed most, norms by part, what is outside the heads, notes."""
    meta, totals = found["meta"], found["totals"]
    shown = "Urel" if meta["norm"] == "document" else "Urel_l2"
    lines: Sequence[Mapping[str, Any]] = found["lines"]
    if shown not in lines[0]:
        shown = "Urel"
    known = any(line[shown] is not None for line in lines)
    keys = ["layer", "head", "U", *([shown] if known else []), "Uq", "Uk", "Uv", "Uo"]
    keys += [name for name in ("OV", "QK") if any(line.get(name) is not None for line in lines)]
    if any((line.get("stack"), line.get("kind")) != (lines[0].get("stack"), lines[0].get("kind")) for line in lines):
        keys = ["stack", "kind", *keys]
    ranked = sorted(lines, key=lambda line: -(line[shown] if known and line[shown] is not None else line["U"]))
    most = ranked if voice.verbose else ranked[:SHOWN]
    title = f"{len(most)} of {len(lines)} heads, the most changed first"
    voice.table(keys, [[line[key] for key in keys] for line in most], title=title)
    parts = ", ".join(f"{part} {value:.4g}" for part, value in totals["parts"].items())
    voice.line(f"\nnorm of the update of all heads {totals['heads']:.6g} ({parts})")
    if totals["share_of_heads"] is not None and not totals["unknown"]:
        voice.line(f"outside the heads {totals['other']:.6g}; heads have {totals['share_of_heads']:.1%} of the energy")
    if found["other_updates"] and (voice.verbose or meta["scope"] == "all"):
        rows = [[row["name"], row["what"], row["U"], row["Urel"], row["r"]] for row in found["other_updates"]]
        voice.table(["module or tensor", "what", "U", "Urel", "rank"], rows, title="Outside the heads")
    elif found["other_updates"]:
        voice.line(f"{len(found['other_updates'])} tensors outside the heads were trained whole (-v lists them)")
    if not known and meta["base"] is None:
        voice.note("note: no base was given, so nothing is relative to it; --base MODEL adds Urel, OV and QK")
    _notes(voice, meta)
    for file in found["files"]:
        voice.line(f"written: {file}")


def _print_path(voice: Output, way: Mapping[str, Any]) -> None:
    """The way of all heads together, and the heads whose way was least straight."""
    total = way["total"]
    ratio, half = (total[key] for key in ("net_over_path", "half_step"))
    voice.line(
        f"{len(way['steps'])} points, steps {way['steps'][0]} to {way['steps'][-1]}: path {total['path']:.4g}, "
        f"net {total['net']:.4g}, net/path {'-' if ratio is None else f'{ratio:.3f}'}, "
        f"half of it at step {'-' if half is None else f'{half:.1f}'}"
    )
    rows = list(zip(way["steps"], total["U"], way["rank_correlation"], strict=True))
    voice.table(["step", "U", "rank correlation with the last"], rows)
    keys = ["layer", "head", "path", "net", "net_over_path", "half_step"]
    known = [line for line in way["heads"] if line["net_over_path"] is not None]
    most = sorted(known, key=lambda line: line["net_over_path"])[: None if voice.verbose else SHOWN]
    voice.table(keys, [[line[key] for key in keys] for line in most], title="Heads, the least straight way first")
    for warning in way["warnings"]:
        voice.note(f"warning: {warning}")
    for file in way["files"]:
        voice.line(f"written: {file}")


def _notes(voice: Output, meta: Mapping[str, Any]) -> None:
    for warning in meta["warnings"]:
        voice.note(f"warning: {warning}")
    for note in meta["notes"]:
        voice.note(f"note: {note}")
