"""The public names: what they are, where they come from, and that they cost nothing until they are used."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import metadata

import pytest

import loraforge as lf
from loraforge.errors import CheckFailed, InputProblems, LoraforgeError, UsageError, did_you_mean, raise_problems

HEAVY = {"torch", "transformers", "peft", "numpy", "safetensors", "matplotlib", "sklearn"}


def test_importing_costs_nothing_and_using_a_name_loads_it() -> None:
    code = f"""
import sys
import loraforge as lf
heavy = {sorted(HEAVY)!r}
assert lf.__version__ and dir(lf) and lf.LoraforgeError and lf.METHODS
assert not [name for name in heavy if name in sys.modules], "import"
assert callable(lf.merge) and "torch" in sys.modules
assert "merge" in vars(lf), "a name is resolved once"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(set(lf.__all__) - {"__version__"}))
def test_public_names(name: str) -> None:
    value = getattr(lf, name)
    assert name in dir(lf)
    if name != "METHODS":
        assert value.__name__ == name and value.__module__.startswith("loraforge")
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_the_room_of_methods_does_not_hide_the_function() -> None:
    import loraforge.merging.runner

    assert lf.merge is loraforge.merging.runner.merge and inspect.isfunction(lf.merge)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        lf.merg  # noqa: B018 - the access is what is tested
    assert not hasattr(lf, "_nothing")


def test_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", lf.__version__)
    assert metadata.version("loraforge") == lf.__version__


def test_merge_takes_two_positions_and_explains_every_argument() -> None:
    parameters = inspect.signature(lf.merge).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["adapters", "method"] and all(
        p.kind is p.KEYWORD_ONLY for n, p in parameters.items() if n not in positional
    )
    for name in parameters:
        assert re.search(rf"^ +{name}: ", lf.merge.__doc__ or "", re.MULTILINE), f"{name} is not explained"
    assert all(p.default is not p.empty for n, p in parameters.items() if n != "adapters")


def test_errors_say_what_where_and_what_next() -> None:
    error = LoraforgeError("it is wrong", where="file: key", got=3, expected=2, hint="do this")
    assert str(error).splitlines() == [
        "it is wrong", "  where: file: key", "  found: 3", "  expected: 2", "  next: do this",
    ]  # fmt: skip
    assert str(LoraforgeError("it is wrong", got=0)).splitlines() == ["it is wrong", "  found: 0"]


def test_exit_codes() -> None:
    codes = {LoraforgeError: 3, UsageError: 2, CheckFailed: 4}
    assert {kind: kind("x").exit_code for kind in codes} == codes
    assert InputProblems([LoraforgeError("a")]).exit_code == 3
    assert all(issubclass(kind, LoraforgeError) for kind in (*codes, InputProblems))


def test_problems_are_shown_at_once() -> None:
    one, two = LoraforgeError("first", where="a"), UsageError("second", hint="b")
    raise_problems([])
    with pytest.raises(UsageError) as single:
        raise_problems([two])
    assert single.value is two
    with pytest.raises(InputProblems) as both:
        raise_problems([one, two])
    assert both.value.problems == [one, two]
    assert str(both.value).splitlines()[1:] == ["1. first", "  where: a", "2. second", "  next: b"]


def test_did_you_mean() -> None:
    assert did_you_mean("sdv", ["svd", "concat"]) == "did you mean 'svd'? known: svd, concat"
    assert did_you_mean("zzz", ["svd", "concat"]) == "known: svd, concat"
