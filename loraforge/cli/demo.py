"""`loraforge demo`: the embedded example, from training to the merged adapter and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output, human_bytes
from loraforge.errors import UsageError

DEFAULT_OUT = "loraforge-demo"
SEQUENCE_OUT = "loraforge-demo-sequence"


def demo(
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder to write.",
            show_default=f"{DEFAULT_OUT}, with --sequence {SEQUENCE_OUT}",
        ),
    ] = None,
    seed: opt.DemoSeed = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two domains, few steps: shows that all works, says nothing else.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Fine-tune and merge whole models instead of adapters.")] = False,
    sequence: Annotated[
        bool,
        typer.Option(
            "--sequence",
            help="Train instead of merge: three tasks one after another, by plain training, replay, I-LORA.",
        ),
    ] = False,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Run the embedded example: train, merge, evaluate; or train a sequence of tasks."""
    from loraforge.cli._places import check_place

    if sequence:
        if full:
            raise UsageError("--sequence trains adapters and merges nothing", got="--full", hint="leave --full out")
        voice = Output(as_json=json, quiet=quiet, verbose=verbose)
        _demo_sequence(voice, Path(out or SEQUENCE_OUT), seed=seed or 0, quick=quick, overwrite=bool(overwrite))
        return
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


def _demo_sequence(voice: Output, folder: Path, *, seed: int, quick: bool, overwrite: bool) -> None:
    """Runs the demo of training. A stopped one may be continued, so the demo itself judges a folder that is there."""
    from loraforge.cli._places import check_place

    check_place(folder, overwrite=True, inputs=())
    with voice.session():
        from loraforge.demo import sequence

        with voice.progress() as progress:
            found = sequence.run_sequence_demo(folder, seed=seed, quick=quick, overwrite=overwrite, progress=progress)
        voice.result(found)
        for line in found["warnings"]:
            voice.note(line)
        _print_sequence(voice, found, folder)


def _print_sequence(voice: Output, found: dict[str, Any], folder: Path) -> None:
    """Accuracy by task after the last one in percent, a row a trained adapter; and where everything is."""
    numbers = ("acc", "bwt", "forgetting", "seconds")
    rows = [
        [row["method"], row["adapter"], *map(_tenths, (*row["accuracies"], *(row[key] for key in numbers)))]
        for row in found["rows"]
    ]
    voice.table(["method", "adapter", *found["tasks"], "ACC", "BWT", "forgetting", "seconds"], rows)
    for line in found["summary"]:
        voice.line(line)
    voice.line(f"done in {found['seconds']:.0f} s")
    for label, path in found["paths"].items():
        voice.line(f"  {label:<10}{path}")
    for method, name in found["runs"].items():
        voice.line(f"  {method:<10}{folder / name}: cl_matrix.json, report.html")
    voice.line(f"another way to train it: loraforge train-ilora {found['paths']['sequence']} --method joint")


def _tenths(value: float | None) -> float | None:
    return None if value is None else round(value, 1) + 0.0
