"""The `loraforge` command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.completion import completion_init, install_callback, show_callback

from loraforge.cli import (
    bench,
    cl_eval,
    cl_report,
    collect_stats,
    compare,
    convert,
    demo,
    doctor,
    download,
    eval,
    inspect,
    measure,
    merge,
    methods,
    plot,
    resize,
    run,
    suggest,
    train_full,
    train_ilora,
    train_lora,
)
from loraforge.cli._errors import INTERRUPTED, USAGE, Boundary

app = typer.Typer(
    name="loraforge",
    cls=Boundary,
    help="Merge LoRA adapters, train them task after task, and measure what they do to a model.",
    epilog="Exit codes: 0 done, 1 internal, 2 usage, 3 bad input, 4 a check failed, 130 interrupted.",
    rich_markup_mode=None,  # plain help costs a third of the start-up time of drawn panels
    pretty_exceptions_enable=False,
    # Typer reads its own options of the top level with pydantic, which costs as much time as all the rest of
    # `COMMAND --help`; flags with a default of False are not read so, and `top` declares the same ones.
    add_completion=False,
    add_help_option=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

completion_init()
app.command("merge")(merge.merge)
app.command("methods")(methods.methods)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("resize")(resize.resize)
app.command("collect-stats")(collect_stats.collect_stats)
app.command("train-lora")(train_lora.train_lora)
app.command("train-full")(train_full.train_full)
app.command("train-ilora")(train_ilora.train_ilora)
app.command("cl-eval")(cl_eval.cl_eval)
app.command("cl-report")(cl_report.cl_report)
app.command("eval")(eval.eval)
app.add_typer(measure.group, name="measure")
app.command("compare")(compare.compare)
app.command("plot")(plot.plot)
app.add_typer(suggest.group, name="suggest")
app.command("run")(run.run)
app.command("download")(download.download)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from loraforge import __version__

        typer.echo(f"loraforge {__version__}")
        raise typer.Exit


def _print_help(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(ctx.get_help())
        raise typer.Exit


def _flag(*names: str, callback: Callable[..., object], help: str) -> Any:
    """An option of the command itself that does its work at once."""
    return typer.Option(*names, callback=callback, is_eager=True, help=help)


@app.callback(invoke_without_command=True)
def top(
    ctx: typer.Context,
    version: Annotated[bool, _flag("--version", callback=_print_version, help="Print the version.")] = False,
    install_completion: Annotated[
        bool, _flag("--install-completion", callback=install_callback, help="Install completion for the current shell.")
    ] = False,
    show_completion: Annotated[
        bool,
        _flag("--show-completion", callback=show_callback, help="Print the completion script of the current shell."),
    ] = False,
    help: Annotated[bool, _flag("-h", "--help", callback=_print_help, help="Show this message and exit.")] = False,
) -> None:
    """Prints the help where no command is named."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(USAGE)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line (default: of this process) and leaves with its exit code.

    Raises:
        SystemExit: Always.
    """
    try:
        app(args=arguments, prog_name="loraforge")
    except SystemExit as left:
        if left.code == INTERRUPTED:
            # Worker threads would hold up the exit, and an import that was cut short can turn the code into a signal.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise
    raise SystemExit(0)
