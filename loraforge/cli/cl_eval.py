"""`loraforge cl-eval`: the score matrix of a training sequence, from its saved adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output
from loraforge.cli.train_ilora import print_scores

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a training sequence.", show_default=False)]
Again = Annotated[bool, typer.Option("--again", help="Score what has scores already, too.")]
Single = Annotated[
    str | None,
    typer.Option(
        "--single", metavar="RUN", show_default=False,
        help="Run of --method single over the same tasks: its scores give the intransigence.",
    ),
]  # fmt: skip


def cl_eval(
    run: Run,
    again: Again = False,
    single: Single = None,
    device: opt.Device = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Score every adapter of a sequence on every task; write the matrix, its metrics and the report anew."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        from loraforge.training.sequence.evaluate import cl_eval as evaluate

        with voice.progress() as progress:
            found = evaluate(
                run, again=again, single=single, device=device or "auto", progress=progress, notify=voice.note
            )
        voice.result(found)
        print_scores(voice, found)
