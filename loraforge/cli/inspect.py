"""`loraforge inspect`: what is in adapters, and how much they agree."""

from __future__ import annotations

from typing import Any

from loraforge.cli import _options as opt
from loraforge.cli._output import Output, human_bytes


def inspect(
    adapters: opt.Adapters,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Show ranks, norms, spectra and cosines of adapters."""
    voice = Output(as_json=json, quiet=quiet, verbose=verbose)
    with voice.session():
        import loraforge

        found = loraforge.inspect(adapters)
        voice.result(found)
        _print(voice, found)


def _print(voice: Output, found: dict[str, Any]) -> None:
    """A row an adapter, with `-v` a table of modules each, and the cosines between the adapters."""
    adapters = found["adapters"]
    headers = ["adapter", "format", "base", "task", "modules", "rank", "scaling", "dtype", "norm", "parameters", "size"]
    voice.table(headers, [_row(adapter) for adapter in adapters])
    for adapter in adapters if voice.verbose else ():
        _print_modules(voice, adapter)
    if len(adapters) > 1:
        names = [adapter["name"] for adapter in adapters]
        rows = [[name, *cosines] for name, cosines in zip(names, found["cosine"], strict=True)]
        voice.table(["cosine", *names], rows, title="Cosine between the deltas")


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
    ]


def _print_modules(voice: Output, adapter: dict[str, Any]) -> None:
    headers = ["module", "shape", "rank", "scaling", "norm", "largest", "effective rank", "stable rank"]
    rows = [
        [
            module["module"],
            " x ".join(map(str, module["shape"])),
            module["rank"],
            module["scaling"],
            module["norm"],
            module["spectrum"][0] if module["spectrum"] else None,
            module["effective_rank"],
            module["stable_rank"],
        ]
        for module in adapter["modules"]
    ]
    voice.table(headers, rows, title=adapter["name"])


def _span(values: list[float]) -> str:
    """One value, or the smallest and the largest."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"
