"""`loraforge measure`: one file a command."""

from __future__ import annotations

import typer

from loraforge.cli.measure import aggregate, doctor, fisher, importance, run, spectrum, update

group = typer.Typer(help="Measure what fine-tuning does to attention heads.", rich_markup_mode=None)
group.command("importance")(importance.importance)
group.command("fisher")(fisher.fisher)
group.command("update")(update.update)
group.command("spectrum")(spectrum.spectrum)
group.command("doctor")(doctor.doctor)
group.command("run")(run.run)
group.command("aggregate")(aggregate.aggregate)
