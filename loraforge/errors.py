"""Errors that a user can act on.

Every message says what is wrong, where (file, key or module), what was found, what was expected and what to do next.
Exit codes: 1 internal, 2 usage, 3 bad input, 4 a check failed, 130 interrupted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraforgeError(Exception):
    """Bad input: a file, key or value that cannot be used (exit code 3).

    Args:
        what: One sentence that says what is wrong.
        where: File, key or module concerned.
        got: What was found there.
        expected: What would have been right.
        hint: The next step or command.
    """

    exit_code = 3

    def __init__(
        self, what: str, *, where: object = None, got: object = None, expected: object = None, hint: str | None = None
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.hint = hint
        super().__init__(self.render())

    def render(self) -> str:
        """The message as lines: what, then the parts that are known."""
        parts = [("where", self.where), ("found", self.got), ("expected", self.expected), ("next", self.hint)]
        return "\n".join([self.what, *(f"  {label}: {value}" for label, value in parts if value is not None)])


class UsageError(LoraforgeError):
    """An unknown command, option, method or parameter (exit code 2)."""

    exit_code = 2


class CheckFailed(LoraforgeError):
    """A self-test or verification found a wrong result (exit code 4)."""

    exit_code = 4


class InputProblems(LoraforgeError):
    """Several independent input problems, shown at once (exit code 3)."""

    def __init__(self, problems: Iterable[LoraforgeError]) -> None:
        self.problems = list(problems)
        super().__init__(f"{len(self.problems)} problems were found in the input")

    def render(self) -> str:
        """All problems, numbered."""
        head = self.what
        return "\n".join([head, *(f"{i}. {p.render()}" for i, p in enumerate(self.problems, 1))])


def raise_problems(problems: list[LoraforgeError]) -> None:
    """Raises nothing for an empty list, the one problem itself, or all of them together."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise InputProblems(problems)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known word and lists all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    # Of words that are equally close, one of the same letters in another order is the likelier slip.
    close.sort(
        key=lambda word: (-round(difflib.SequenceMatcher(None, word, name).ratio(), 6), sorted(word) != sorted(name))
    )
    head = f"did you mean '{close[0]}'? " if close else ""
    return f"{head}known: {', '.join(names)}"
