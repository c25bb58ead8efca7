"""`loraforge collect-stats`: input statistics of a model over data, and the parts of several processes joined."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output, human_bytes
from loraforge.errors import UsageError

# Modules without a statistic that are named without -v.
SHOWN = 5

Parts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PART", help="With --merge: the files of all parts.", show_default=False),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="FILE", help="Calibration data of any kind (repeat).", show_default=False),
]
OutFile = Annotated[
    str | None, typer.Option("--out", "-o", metavar="FILE.safetensors", help="File to write.", show_default=False)
]
Kind = Annotated[
    Literal["diag", "gram"] | None,
    typer.Option("--kind", help="Squared L2 of each input feature, or all of X^T X.", show_default="diag"),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--targets", metavar="NAMES|REGEX", help="Modules: last parts with commas, or a regular expression (repeat).",
        show_default="every linear module",
    ),
]  # fmt: skip
Adapter = Annotated[
    str | None, typer.Option("--adapter", metavar="ADAPTER", help="Instead: the modules that it changes.")
]
Part = Annotated[
    str | None, typer.Option("--part", metavar="i/n", help="Every n-th batch only, for n processes; see --merge.")
]
Merge = Annotated[bool, typer.Option("--merge", help="Join the files of all parts into one.")]
BaseDtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None,
    typer.Option("--base-dtype", help="Of the base's weights; sums are float64.", show_default="float32"),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the choice of samples.", show_default="42")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Samples a file.", show_default="256")]


def collect_stats(
    ctx: typer.Context,
    parts: Parts = None,
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Model to measure.")] = None,
    data: Data = None,
    out: OutFile = None,
    kind: Kind = None,
    targets: Targets = None,
    adapter: Adapter = None,
    samples: Samples = None,
    seed: Seed = None,
    max_length: opt.MaxLength = None,
    batch_tokens: opt.BatchTokens = None,
    template: opt.Template = None,
    part: Part = None,
    merge: Merge = False,
    base_dtype: BaseDtype = None,
    device: opt.Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Collect what a model's linear modules are fed with, for methods that read it."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    given = {key: value for key, value in ctx.params.items() if not (value is None or value is False or value == ())}
    for key in ("json", "quiet", "verbose", "debug"):
        given.pop(key, None)
    if out is None:
        raise UsageError("no output file was named", expected="--out FILE.safetensors")
    if merge:
        _check_merge(given)
    else:
        _check_collect(given)
        given["dtype"] = given.pop("base_dtype", "float32")
    with voice.session():
        found = _join(given) if merge else _collect(voice, given)
        voice.result(found)
        _print(voice, found)


def _check_merge(given: dict[str, Any]) -> None:
    others = sorted(given.keys() - {"parts", "out", "merge", "overwrite"})
    if others:
        got = ", ".join(f"--{key.replace('_', '-')}" for key in others)
        raise UsageError("--merge reads files and collects nothing", got=got, hint="leave these out")
    if "parts" not in given:
        raise UsageError("no part was named", expected="collect-stats --merge PART PART ... --out FILE")


def _check_collect(given: dict[str, Any]) -> None:
    if "parts" in given:
        hint = "--merge joins the files of parts; --data names data"
        raise UsageError("an argument without a meaning", got=given["parts"][0], hint=hint)
    for key, metavar in (("base", "MODEL"), ("data", "FILE")):
        if key not in given:
            raise UsageError(f"--{key} is missing", expected=f"--{key} {metavar}")


def _join(given: dict[str, Any]) -> dict[str, Any]:
    import loraforge

    return loraforge.merge_stats(given["parts"], given["out"], overwrite="overwrite" in given)


def _collect(voice: Output, given: dict[str, Any]) -> dict[str, Any]:
    import loraforge

    try:
        with voice.progress() as progress:
            return loraforge.collect_stats(**given, progress=progress)
    except KeyboardInterrupt:
        voice.note("the sums are saved every few seconds: the same command with --resume goes on")
        raise


def _print(voice: Output, found: dict[str, Any]) -> None:
    tokens, part = found["tokens"], found["part"]
    skipped = found.get("skipped") or {}
    shown = list(skipped.items()) if voice.verbose else list(skipped.items())[:SHOWN]
    for name, reason in shown:
        voice.note(f"warning: no statistic of {name}: {reason}")
    if len(shown) < len(skipped):
        voice.note(f"warning: and {len(skipped) - len(shown)} more without a statistic (-v shows all)")
    headers = ["kind", "part", "modules", "samples", "batches", "tokens a module", "size"]
    span = str(tokens["most"]) if tokens["fewest"] == tokens["most"] else f"{tokens['fewest']}..{tokens['most']}"
    whole = "whole" if part[1] == 1 else f"{part[0]}/{part[1]}"
    cells = [found["kind"], whole, found["modules"], found["samples"], found["batches"], span]
    voice.table(headers, [[*cells, human_bytes(found["bytes"])]])
    if found.get("resumed_from"):
        voice.line(f"went on after batch {found['resumed_from']} of {found['batches']}")
    voice.line(f"written to {found['out']}")
    if part[1] > 1:
        voice.line(f"join the {part[1]} parts: loraforge collect-stats --merge PART PART ... --out FILE.safetensors")
