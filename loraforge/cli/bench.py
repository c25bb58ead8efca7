"""`loraforge bench`: operators, merges and the calibrated merge beside references and peers."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._errors import CHECK_FAILED
from loraforge.cli._output import Output, human_number, json_ready
from loraforge.errors import UsageError

if TYPE_CHECKING:
    from loraforge.bench.tables import Page

Groups = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="GROUP", help="kernels, merge, iteris, train, heads, scale; all of them by default.", show_default=False
    ),
]
Full = Annotated[bool, typer.Option("--full", help="Larger sizes, many minutes.")]
Size = Annotated[str | None, typer.Option("--size", hidden=True)]
Threads = Annotated[
    int, typer.Option("--threads", min=1, metavar="N", help="Threads of the CPU; 1 measures processor time.")
]
Runs = Annotated[
    int | None,
    typer.Option("--runs", min=1, metavar="N", help="Timings a form.", show_default="as many as fit, 3 to 15"),
]
OutFile = Annotated[str | None, typer.Option("--out", "-o", metavar="FILE.json", help="Also write the JSON object.")]
Plot = Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Also draw speed-ups and growth.")]
Compare = Annotated[str | None, typer.Option("--compare", metavar="FILE.json", help="Earlier results to compare with.")]
FailOver = Annotated[
    float | None,
    typer.Option(
        "--fail-over", metavar="RATIO", help="With --compare: exit with 4 if a time grew by more than this factor."
    ),
]


def bench(
    groups: Groups = None,
    full: Full = False,
    size: Size = None,
    device: opt.Device = None,
    threads: Threads = 1,
    runs: Runs = None,
    out: OutFile = None,
    plot: Plot = None,
    compare: Compare = None,
    fail_over: FailOver = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Measure operators and merges beside references and peers."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    from loraforge.bench.groups import check_groups

    check_groups(groups or ())
    _check_ratio(fail_over, compare)
    files = [_check_file(name, kind, compare, bool(overwrite)) for name, kind in ((out, ".json"), (plot, ".png"))]
    with voice.session():
        from loraforge.bench.run import run_bench

        with voice.progress() as progress:
            result = run_bench(
                groups or (), size=size or ("full" if full else "default"), device=device or "auto", threads=threads,
                runs=runs, compare_with=compare, progress=progress,
            )  # fmt: skip
        _write(result, *files)
        voice.result(result)
        print_result(voice, result)
        for file in files:
            if file is not None:
                voice.line(f"written to {file}")
        problems = _problems(result, fail_over)
    for problem in problems:  # an exit code without a word helps nobody, so this is said with --quiet as well
        sys.stderr.write(f"a check failed: {problem}\n")
    if problems:
        raise typer.Exit(CHECK_FAILED)


def _check_ratio(fail_over: float | None, compare: str | None) -> None:
    if fail_over is None:
        return
    if compare is None:
        raise UsageError("--fail-over compares with earlier results", expected="--compare FILE.json beside it")
    if not 1.0 <= fail_over < float("inf"):
        raise UsageError("--fail-over is a factor", got=fail_over, expected="a number from 1 on, as 1.2")


def _check_file(name: str | None, kind: str, compare: str | None, overwrite: bool) -> Path | None:
    """The file to write, refused before any work where it cannot be."""
    from loraforge.cli._places import check_place

    if name is None:
        return None
    path = Path(name)
    if path.suffix.lower() != kind:
        option = "--out" if kind == ".json" else "--plot"
        raise UsageError(f"{option} takes a {kind} file", where=option, got=name, expected=f"NAME{kind}")
    check_place(path, overwrite=overwrite, inputs=[compare] if compare else [])
    return path


def _write(result: dict[str, Any], out: Path | None, plot: Path | None) -> None:
    """The files, whole or not at all."""
    from loraforge.report.page import whole_file

    if out is not None:
        with whole_file(out) as draft:
            draft.write_text(jsonlib.dumps(json_ready(result), indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        from loraforge.report.bench_charts import save_bench_picture

        with whole_file(plot) as draft:
            save_bench_picture(draft, result)


def print_result(voice: Output, result: dict[str, Any]) -> None:
    """Where and how, a table a group, what was left out, and the comparison."""
    from loraforge.bench.tables import all_rows, comparison_page, heading, pages, skipped_lines

    for line in heading(result):
        voice.line(line)
    shown = [*pages(result), *([all_rows(result)] if voice.verbose else [])]
    if "comparison" in result:
        shown.append(comparison_page(result["comparison"]))
    for page in shown:
        _print_page(voice, page)
    for line in skipped_lines(result):
        voice.note(line)
    comparison = result.get("comparison", {})
    for note in comparison.get("notes", ()):
        voice.note(f"note: {note}")
    for side, names in (("now", comparison.get("only_new")), ("stored", comparison.get("only_old"))):
        if names:
            voice.note(f"not compared: {len(names)} timings only {side} (first: {names[0]})")
    voice.line(f"\n{len(result['rows'])} timings in {result['seconds']:.0f} s")


def _print_page(voice: Output, page: Page) -> None:
    """A table with as many columns as the terminal has room for: one that is too wide would have its numbers cut."""
    rows = [[_short(cell) for cell in row] for row in page.rows]
    widths = {
        header: max([len(header), *(len(human_number(row[at])) for row in rows)])
        for at, header in enumerate(page.headers)
    }
    left_out: list[str] = []
    for header in page.spare:
        if voice.has_room(sum(widths.values()) + 2 * len(widths)):
            break
        del widths[header]
        left_out.append(header)
    narrow = page.without(left_out)
    voice.table(narrow.headers, [[_short(cell) for cell in row] for row in narrow.rows], title=page.title)
    if left_out:
        voice.line(f"no room here for: {', '.join(left_out)}; --json and --out have them")


def _short(cell: object) -> object:
    """Three significant digits: more would claim what a timing does not know."""
    return float(f"{cell:.3g}") if isinstance(cell, float) else cell


def _problems(result: dict[str, Any], fail_over: float | None) -> list[str]:
    """Wrong results, and times that grew too much."""
    from loraforge.bench.verdicts import too_slow

    found = [_wrong(failure) for failure in result["failures"]]
    if fail_over is not None:
        if not result["comparison"]["rows"]:
            found.append("no timing is in both results, so --fail-over has nothing to judge")
        found += [
            f"{row['group']} {row['case']} {row['form']} takes {row['ratio']:.2f} times as long as stored"
            for row in too_slow(result["comparison"], fail_over)
        ]
    return found


def _wrong(failure: dict[str, Any]) -> str:
    name = f"{failure['group']} {failure['case']}, form {failure['form']}"
    if failure["error"] is None:
        return f"{name}: the objective is wrong"
    return f"{name}: error {failure['error']:.3g}, allowed {failure['allowed']:.3g}"
