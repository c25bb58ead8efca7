"""`loraforge inspect`: what is in adapters, and how much they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loraforge.cli import _options as opt
from loraforge.cli._output import Output, human_bytes
from loraforge.errors import UsageError

# The matrices over the adapters: key of the result and title of the table.
MATRICES = {
    "cosine": "Cosine between the deltas",
    "sign_conflict": "Sign conflict: share of entries with opposite signs (0.5: unrelated)",
    "overlap_out": "Shared output directions (0: none, 1: all)",
    "overlap_in": "Shared input directions (0: none, 1: all)",
}
# Modules that an adapter lacks, named without -v.
SHOWN = 4

Picture = Annotated[str | None, typer.Option("--picture", metavar="FILE.png", help="Also draw conflicts and spectra.")]


def inspect(
    adapters: opt.Adapters,
    picture: Picture = None,
    report: opt.Report = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Show ranks, norms, spectra and conflicts of adapters."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    files = _check_files(adapters, picture, report, overwrite=bool(overwrite))
    with voice.session():
        import loraforge

        found = loraforge.inspect(adapters, device=device or "auto")
        _write(found, *files)
        voice.result(found)
        _print(voice, found)
        for file in files:
            if file is not None:
                voice.line(f"written to {file}")


def _check_files(
    adapters: list[str], picture: str | None, report: str | None, *, overwrite: bool
) -> tuple[Path | None, Path | None]:
    """The files to write, refused before any work where they cannot be."""
    from loraforge.cli._places import check_place, check_report

    image, page = (None if name is None else Path(name) for name in (picture, report))
    if image is not None:
        if image.suffix.lower() != ".png":
            raise UsageError("the picture is a .png file", where="--picture", got=picture, expected="NAME.png")
        check_place(image, overwrite=overwrite, inputs=adapters)
    check_report(page, overwrite=overwrite, inputs=adapters)
    return image, page


def _write(found: dict[str, Any], picture: Path | None, report: Path | None) -> None:
    if picture is None and report is None:
        return
    from loraforge.report import save_inspection_picture, write_inspection_report

    if picture is not None:
        save_inspection_picture(picture, found)
    if report is not None:
        write_inspection_report(report, found)


def _print(voice: Output, found: dict[str, Any]) -> None:
    """A row an adapter, with `-v` a table of modules each; coverage and the matrices between the adapters."""
    adapters = found["adapters"]
    headers = [
        "adapter", "format", "base", "task", "modules", "rank", "scaling", "dtype", "norm", "parameters", "size",
        "eff. rank", "rank 90 %", "rank 99 %",
    ]  # fmt: skip
    voice.table(headers, [_row(adapter) for adapter in adapters])
    for adapter in adapters:
        for note in adapter["notes"]:
            voice.note(f"note: {adapter['name']}: {note}")
    for adapter in adapters if voice.verbose else ():
        _print_modules(voice, adapter)
    _print_coverage(voice, found["coverage"])
    if len(adapters) > 1:
        names = [adapter["name"] for adapter in adapters]
        for key, title in MATRICES.items():
            # The diagonal of a conflict says nothing.
            rows = [
                [name, *(None if i == j and key != "cosine" else value for j, value in enumerate(row))]
                for i, (name, row) in enumerate(zip(names, found[key], strict=True))
            ]
            voice.table([key.replace("_", " "), *names], rows, title=title)


def _row(adapter: dict[str, Any]) -> list[object]:
    modules = adapter["modules"]
    return [
        adapter["name"],
        adapter["format"],
        adapter["base"],
        adapter["task_type"],
        len(modules),
        _span([module["rank"] for module in modules]),
        _span([module["scaling"] for module in modules]),
        ", ".join(sorted({module["dtype"] for module in modules})),
        adapter["norm"],
        adapter["parameters"],
        human_bytes(adapter["bytes"]),
        adapter["effective_rank"],
        adapter["rank_90"],
        adapter["rank_99"],
    ]


def _print_coverage(voice: Output, coverage: dict[str, Any]) -> None:
    """Kinds of modules, and what each adapter lacks of the union."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in coverage["kinds"].items())
    several = len(coverage["missing"]) > 1
    shared = f", {coverage['shared_by_all']} in all adapters" if several else ""
    voice.line(f"\n{coverage['modules']} modules ({kinds}){shared}")
    for name, missing in coverage["missing"].items():
        if missing:
            shown = missing if voice.verbose else missing[:SHOWN]
            more = f" and {len(missing) - len(shown)} more" if len(shown) < len(missing) else ""
            voice.line(f"{name} lacks {len(missing)}: {', '.join(shown)}{more}")


def _print_modules(voice: Output, adapter: dict[str, Any]) -> None:
    keys = ("rank", "scaling", "norm", "effective_rank", "stable_rank", "rank_90", "rank_99")
    rows = [
        [
            module["module"],
            module["kind"],
            " x ".join(map(str, module["shape"])),
            *(module[key] for key in keys[:3]),
            module["spectrum"][0] if module["spectrum"] else None,
            *(module[key] for key in keys[3:]),
        ]
        for module in adapter["modules"]
    ]
    headers = [
        "module", "kind", "shape", "rank", "scaling", "norm", "largest", "effective rank", "stable rank", "rank 90 %",
        "rank 99 %",
    ]  # fmt: skip
    voice.table(headers, rows, title=adapter["name"])


def _span(values: list[float]) -> str:
    """One value, or the smallest and the largest."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"
