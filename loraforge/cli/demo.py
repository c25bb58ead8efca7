"""`loraforge demo`: the embedded example, from training to the merged adapter and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output, human_bytes

DEFAULT_OUT = "loraforge-demo"


def demo(
    out: opt.Out = DEFAULT_OUT,
    seed: opt.DemoSeed = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two domains, few steps: shows that all works, says nothing else.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Fine-tune and merge whole models instead of adapters.")] = False,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Run the embedded example: train, merge, evaluate."""
    from loraforge.cli._places import check_place

    folder = Path(out or DEFAULT_OUT)
    check_place(folder, overwrite=bool(overwrite), inputs=())
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        import loraforge

        with voice.progress() as progress:
            found = loraforge.run_demo(
                folder, seed=seed or 0, quick=quick, full=full, overwrite=bool(overwrite), progress=progress
            )
        voice.result(found)
        _print(voice, found)


def _print(voice: Output, found: dict[str, Any]) -> None:
    """Accuracy by task in percent, a row a model, then what it took and where everything is."""
    tasks = found["tasks"]
    rows = [
        [row["name"], *row["accuracies"], row["mean"], row["rank"], row["seconds"], human_bytes(row["bytes"])]
        for row in found["rows"]
    ]
    voice.table(["model", *tasks, "mean", "rank", "seconds", "size"], rows)
    voice.line(f"done in {found['seconds']:.0f} s")
    for label, path in found["paths"].items():
        voice.line(f"  {label:<10}{path}")
