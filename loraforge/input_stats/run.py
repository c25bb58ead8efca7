"""The loop over the batches, which can be killed at any time and taken up again.

Sums are kept beside the output between two batches. They are exact float64, so a run that was taken up adds the same
numbers in the same order as one that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraforge.calibrate.batches import Batch
from loraforge.calibrate.input_statistics import InputSums
from loraforge.errors import LoraforgeError
from loraforge.input_stats.file import Contents, open_stats, read_contents, write_contents

Progress = Callable[[str, str, int, int], None]
# Seconds between two saves of an unfinished run; more where saving itself takes long.
SAVE_SECONDS, SAVE_SHARE = 5.0, 0.05


def unfinished_path(out: Path) -> Path:
    """Where an unfinished run keeps its sums."""
    return out.with_name(f".{out.name}.unfinished")


def run_batches(
    sums: InputSums,
    batches: Sequence[Batch],
    out: Path,
    about: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
) -> int:
    """Adds all batches, saving now and then, and writes the file.

    Returns:
        How many batches had been done before.
    """
    saved = unfinished_path(out)
    if resume and not overwrite and out.exists():
        found = open_stats(out)[1]
        _check_same(found, about, out)
        sums.tokens = dict(found["tokens"])
        return len(batches)
    start = _take_up(sums, saved, about, resume=resume, overwrite=overwrite)
    last, pause = time.monotonic(), SAVE_SECONDS
    samples = sum(len(batch.indices) for batch in batches[:start])
    for done, batch in enumerate(batches[start:], start + 1):
        with _forgotten_if_refused(saved):
            sums.add(batch)
        samples += len(batch.indices)
        if progress is not None:
            progress("collect", f"{samples} samples", done, len(batches))
        if done < len(batches) and time.monotonic() - last >= pause:
            began = time.monotonic()
            state = {name: total.cpu() for name, total in sums.sums.items()}
            write_contents(saved, Contents({**about, "tokens": sums.tokens, "done": done}, state))
            last = time.monotonic()
            pause = max(SAVE_SECONDS, (last - began) / SAVE_SHARE)
    with _forgotten_if_refused(saved):
        means = sums.means()
    write_contents(out, Contents({**about, "tokens": sums.tokens}, means))
    saved.unlink(missing_ok=True)
    return start


@contextmanager
def _forgotten_if_refused(saved: Path) -> Iterator[None]:
    """Data that were refused are refused again: nothing is kept to go on with."""
    try:
        yield
    except LoraforgeError:
        saved.unlink(missing_ok=True)
        raise


def _take_up(sums: InputSums, saved: Path, about: Mapping[str, Any], *, resume: bool, overwrite: bool) -> int:
    """Puts the sums of an interrupted run in place; the number of batches in them.

    Raises:
        LoraforgeError: There is one and nobody said what to do with it, or it is of another command.
    """
    if not saved.exists() or (overwrite and not resume):
        return 0
    if not resume:
        hint = "--resume goes on with it, --overwrite starts anew"
        raise LoraforgeError("an interrupted run of this output was left", where=saved, hint=hint)
    found = read_contents(saved)
    _check_same(found.about, about, saved)
    sums.tokens = {name: found.about["tokens"][name] for name in sums.targets}
    device = next(sums.model.parameters()).device
    sums.sums = {name: total.to(device) for name, total in found.tensors.items()}
    return int(found.about["done"])


def _check_same(found: Mapping[str, Any], about: Mapping[str, Any], where: Path) -> None:
    """Refuses to go on with what another command began."""
    differing = [key for key in about if found.get(key) != about[key]]
    if differing:
        raise LoraforgeError(
            "what is there was made by another command, so it cannot be gone on with",
            where=where,
            got=f"another {', '.join(differing)}",
            hint="run the same command again, or start anew with --overwrite",
        )
