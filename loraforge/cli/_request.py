"""What `loraforge merge` was asked for: options over recipe over preset, checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraforge.cli._places import check_output, check_report, input_paths
from loraforge.errors import LoraforgeError, UsageError, did_you_mean

if TYPE_CHECKING:
    from loraforge.merging.methods import MethodRow

# Arguments of `loraforge.merge` that are options of the same name and keys of a recipe.
PASSED = (
    "rank", "energy", "nuclear", "ratio", "fro_error", "budget", "min_rank", "max_rank", "uniform_rank", "post",
    "dtype", "device", "seed", "base", "samples", "batch_tokens", "on_missing", "heads_from", "force", "template",
    "format", "output_kind", "resume", "ignore_unknown",
)  # fmt: skip
FORMATS = ("auto", "peft", "kohya", "diffusers")
# Sugar flags: option -> (method parameter, flag when true or valued, flag when false).
SUGAR = {
    "mats": ("use_mats", "--mats", "--no-mats"),
    "camr": ("use_camr", "--camr", "--no-camr"),
    "dcs": ("use_dcs", "--dcs", "--no-dcs"),
    "max_iter": ("max_iter", "--max-iter", "--max-iter"),
    "init": ("init", "--init", "--init"),
    "verify": ("verify", "--verify", "--no-verify"),
    **{
        name: (name, f"--{name.replace('_', '-')}", f"--{name.replace('_', '-')}")
        for name in (
            "density", "scope", "common_fraction", "mean_over", "alpha", "target_norm", "keep", "prune_level", "iters",
            "sparsity", "rank_ratio", "rank_basis", "center", "t", "ridge", "document_compat",
        )
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """A merge that passed the checks that need no file of an adapter.

    Attributes:
        arguments: Keyword arguments of `loraforge.merge`, the adapters among them.
        out: Folder to write; None for a dry run without one.
        report: HTML file to write, or None.
        overwrite: Whether existing outputs are replaced.
        notes: What a recipe says that has no effect here.
    """

    arguments: dict[str, Any]
    out: Path | None
    report: Path | None
    overwrite: bool
    notes: tuple[str, ...] = ()


def build_request(options: Mapping[str, Any]) -> MergeRequest:
    """Joins options, recipe and preset and refuses what cannot be done.

    Args:
        options: Option name to value; None or an empty list where it was not given.

    Raises:
        UsageError: A method, parameter or option that does not exist or contradicts another, or one that is missing.
        LoraforgeError: An output that exists or cannot be written, an unsupported format, a damaged recipe.
    """
    from loraforge.merging.methods import find_method

    wanted = _wanted(options)
    if not wanted.get("method"):
        raise UsageError("no merge method was named", expected="--method NAME", hint="loraforge methods lists them")
    row = find_method(str(wanted["method"]))
    adapters = wanted.get("adapters")
    if not adapters:
        raise UsageError("no adapter was named", expected="loraforge merge ADAPTER ADAPTER... --method NAME --out DIR")
    if wanted.get("format", "auto") not in FORMATS:
        name = wanted["format"]
        raise UsageError(f"unknown format '{name}'", where="--format", hint=did_you_mean(name, FORMATS))
    arguments = {key: wanted[key] for key in (*PASSED, "adapters", "weights", "calibration", "stats") if key in wanted}
    arguments |= {"method": row.name, "params": _params(row, wanted.get("params") or {}, options)}
    if options["weight"] is not None:
        arguments["weights"] = pair_weights(options["weight"], adapters)
    # In a recipe `max_length` is a parameter of the method; as an option it bounds any calibration data.
    if options["max_length"] is not None:
        arguments["max_length"] = options["max_length"]
    out, report = (Path(wanted[key]) if wanted.get(key) else None for key in ("out", "report"))
    overwrite = bool(wanted.get("overwrite"))
    if options["dry_run"]:
        arguments["dry_run"] = True
    elif out is None:
        raise UsageError("no output folder was named", expected="--out DIR", hint="--dry-run prints the plan instead")
    else:
        files = [wanted.get("calibration"), wanted.get("stats")]
        inputs = input_paths(adapters, wanted.get("base"), files, options["recipe"])
        check_output(out, overwrite=overwrite, inputs=inputs, resume=bool(wanted.get("resume")))
        arguments |= {"out": out, "overwrite": overwrite}
        check_report(report, overwrite=overwrite, inputs=inputs)
    return MergeRequest(arguments, out, report, overwrite, tuple(wanted.get("notes", ())))


def _wanted(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were typed over the recipe over the preset, in a recipe's words (without `--set`)."""
    given = {key: options[key] for key in (*PASSED, "method", "out", "report", "overwrite")}
    given["adapters"] = list(options["adapters"] or ()) or None
    given["weights"] = read_weights(options["weights"], options["weight"])
    given["calibration"] = read_files(options["calibration"] or (), "--calibration")
    given["stats"] = read_files(options["stats"] or (), "--stats")
    given = {key: value for key, value in given.items() if value is not None}
    if not options["preset"] and not options["recipe"]:
        return given
    from loraforge.recipes import load_recipe, merge_recipe

    recipe: dict[str, Any] = {}
    if options["preset"] and options["method"]:
        _check_preset(options["preset"], options["method"])
    for source in (preset_of(options["preset"], options["method"]), options["recipe"]):
        if source:
            recipe = merge_recipe(recipe, load_recipe(source))
    return merge_recipe(recipe, given)


def _params(row: MethodRow, from_recipe: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The method parameters: those typed over those of the recipe, checked by the method's dataclass."""
    from loraforge.cli._settings import parse_settings

    flags = {
        key: (off if options[option] is False else on, options[option])
        for option, (key, on, off) in SUGAR.items()
        if options[option] is not None
    }
    values = {**from_recipe, **parse_settings(row, options["settings"] or (), flags)}
    row.make_params(values)
    return values


def read_weights(text: str | None, first: float | None) -> list[float] | None:
    """The weights of `--weights w,w,...`.

    Raises:
        UsageError: Not numbers, or `--weight` beside it.
    """
    if text is None:
        return None
    if first is not None:
        raise UsageError("--weight and --weights name the same thing", expected="one of the two")
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        expected = "for example --weights 1.0,0.5"
        raise UsageError("--weights takes numbers with commas between them", got=text, expected=expected) from error


def pair_weights(first: float, adapters: Sequence[str]) -> list[float]:
    """The weights of `--weight w`: w and 1-w.

    Raises:
        LoraforgeError: Another number of adapters than two.
    """
    if len(adapters) != 2:
        raise LoraforgeError(
            "--weight W means the weights W and 1-W of two adapters",
            got=f"{len(adapters)} adapters",
            expected="2 adapters",
            hint="give --weights with one number an adapter",
        )
    return [first, 1.0 - first]


def read_files(entries: Sequence[str], option: str) -> dict[str, str] | list[str] | None:
    """One file an adapter: by adapter name for `NAME=FILE`, in the adapters' order for plain files.

    Raises:
        UsageError: Both spellings at once, or one name twice.
    """
    named: dict[str, str] = {}
    plain: list[str] = []
    for entry in entries:
        name, equals, file = entry.partition("=")
        # A file may have "=" in its name; what exists as a whole, or has a folder before the "=", is a file.
        if not equals or os.sep in name or os.path.exists(entry):
            plain.append(entry)
        elif name in named:
            expected = f"one {option} an adapter"
            got = f"{named[name]} and {file}"
            raise UsageError(f"one adapter has two files of {option}", where=name, got=got, expected=expected)
        else:
            named[name] = file
    if named and plain:
        expected = "NAME=FILE for every adapter, or FILE for every adapter"
        raise UsageError(f"{option} is given by name and in order", got=", ".join(entries), expected=expected)
    return named or plain or None


def _check_preset(name: str, method: str) -> None:
    """Refuses a preset of parameters that belong to another method.

    Raises:
        UsageError: Naming both.
    """
    from loraforge.merging.methods import find_method
    from loraforge.recipes import load_recipe

    preset = load_recipe(preset_of(name, method) or name)
    named = preset.get("method")
    row = find_method(method)
    if preset.get("params") and named and row.params != find_method(str(named)).params:
        raise UsageError(
            f"preset '{name}' has parameters of method '{named}'",
            got=f"--method {row.name}",
            hint="leave one of them out",
        )


def preset_of(name: str | None, method: str | None) -> str | None:
    """The preset of a name; METHOD.NAME where the method has one of its own."""
    from loraforge.recipes import preset_names

    own = f"{method}.{name}"
    return own if name and method and own in preset_names() else name
