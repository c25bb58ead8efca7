"""`loraforge train-ilora`: a sequence of tasks, trained one after another and scored after each."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output, human_bytes
from loraforge.errors import UsageError

Sequence = Annotated[
    str, typer.Argument(metavar="SEQUENCE.yaml", help="Base, tasks and settings of the run.", show_default=False)
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method", "-m", metavar="ilora|seq|er|joint|single",
        help="I-LORA or a baseline; another one than the file's goes into OUT-METHOD.", show_default="the file's",
    ),
]  # fmt: skip
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", show_default=False,
        help="Setting over the file's (repeat), as ema_alpha=0.02 or train.learning_rate=1e-4.",
    ),
]  # fmt: skip
Resume = Annotated[
    str,
    typer.Option(
        "--resume", metavar="auto|never|DIR",
        help="Skip finished tasks and go on with a broken one; or refuse what is there; or go on from a checkpoint.",
    ),
]  # fmt: skip
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="1-3", help="Train these tasks alone: numbers or ids.", show_default="all"),
]
Processes = Annotated[
    int | None, typer.Option("--nproc", min=1, metavar="N", help="Train with N processes on this machine.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every random draw.", show_default="the file's, 0")]


def train_ilora(
    sequence: Sequence,
    method: Method = None,
    settings: Set = None,
    out: opt.Out = None,
    tasks: Tasks = None,
    resume: Resume = "auto",
    overwrite: opt.Overwrite = None,
    nproc: Processes = None,
    seed: Seed = None,
    device: opt.Device = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Train a sequence of tasks without forgetting the earlier ones (I-LORA), or by a baseline.

    The run's folder holds the adapters after each task, the score matrix, metrics and a report. A run that was stopped
    goes on where it was with the same command. buffer.safetensors and checkpoints hold rows of the training data as
    tokens, readable by you alone; --set persist_buffer=false keeps them off the disk (later tasks then replay nothing).
    """
    if nproc is not None and "RANK" in os.environ:
        raise UsageError("a launcher started this process already", where="--nproc", hint="leave --nproc out")
    if nproc is not None and nproc > 1 and not dry_run:
        from loraforge.training.sequence.spec import load_sequence

        load_sequence(sequence)  # what is wrong there is told once, not by every process
        _launch(nproc)
        return
    # Of several processes one speaks.
    first = os.environ.get("RANK", "0") == "0"
    voice = Output(as_json=json and first, quiet=quiet or not first, verbose=verbose)
    with voice.session():
        from loraforge.training.sequence.run import train_ilora as run

        try:
            with voice.progress() as progress:
                found = run(
                    sequence, method=method, set=settings, resume=resume, overwrite=bool(overwrite), tasks=tasks,
                    dry_run=dry_run, out=out, seed=seed, device=device or "auto", progress=progress, notify=voice.note,
                )  # fmt: skip
        except KeyboardInterrupt:
            if not dry_run:
                voice.note("note: what is done is kept; the same command goes on from there")
            raise
        voice.result(found)
        if dry_run:
            _print_plan(voice, found)
        else:
            print_scores(voice, found)


def _launch(count: int) -> None:
    """Runs this command line in several processes; leaves with the code of the first that fails.

    Raises:
        SystemExit: A process failed.
    """
    import uuid

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    arguments = _without_nproc(sys.argv[1:])
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=0, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", logs_specs=DefaultLogsSpecs(local_ranks_filter={0}),
    )  # fmt: skip
    # As a launcher does: the processes would otherwise fight over all cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        elastic_launch(config, sys.executable)("-m", "loraforge", *arguments)
    except ChildFailedError as error:
        sys.exit(next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1))


def _without_nproc(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and not argument.startswith("--nproc="):
            kept += [] if argument == "--nproc" else [argument]
        skip = argument == "--nproc" and not skip
    return kept


def _print_plan(voice: Output, found: dict[str, Any]) -> None:
    """A row a task, and what the run takes."""
    headers = ["task", "state", "rows", "steps", "cost a step", "scores", "starts from"]
    rows = [
        [u["id"], u["state"], u["rows"], u["steps"], u["cost"], u["scores"], u["starts_from"]] for u in found["units"]
    ]
    voice.table(headers, rows)
    memory = found["memory"]
    voice.line(
        f"{found['method']} on {found['base']} ({found['kind']}): {found['trainable_parameters']} of "
        f"{found['parameters']} parameters are trained; {found['pairs']} pairs of default and ema tensors"
    )
    voice.line(
        f"{found['steps']} steps; memory without activations {human_bytes(memory['total_bytes'])} (weights "
        f"{human_bytes(memory['weights_bytes'])}, optimiser {human_bytes(memory['optimiser_bytes'])}, buffer "
        f"{human_bytes(memory['buffer_bytes'])}); cost is counted in steps of plain training"
    )
    voice.line(f"would be written to {found['out']}")


def print_scores(voice: Output, found: dict[str, Any]) -> None:
    """The score matrix, the metrics of each adapter, and where everything is."""
    tasks, matrix = found["tasks"], found["matrix"]
    word = {"single": "only", "joint": ""}.get(found["method"], "after")
    for adapter, rows in matrix.items():
        if adapter == "base":
            continue
        labels = [f"{word} {unit['id']}".strip() for unit in found["units"]]
        table = [[label, *row] for label, row in zip(labels, rows, strict=False)]
        base = [["base", *matrix["base"]]] if matrix["base"] else []
        voice.table([adapter, *tasks], base + table, title=f"scores of the {adapter} adapter")
    metrics = {adapter: values for adapter, values in found["metrics"].items() if values}
    if metrics:
        names = list(next(iter(metrics.values())))
        voice.table(
            ["adapter", *names],
            [[adapter, *(values[name] for name in names)] for adapter, values in metrics.items()],
            title="over the sequence",
        )
    voice.line(f"written to {found['out']}; report: {os.path.join(found['out'], 'report.html')}")
