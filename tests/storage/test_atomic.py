"""Folders and files that appear whole or not at all, also when the process is killed; what the next run does then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from loraforge.errors import LoraforgeError
from loraforge.storage.atomic import new_folder, write_whole
from loraforge.storage.leftovers import RESUME

PRINT = {"inputs": ["a", "b"], "seed": 1}
# Kills a writer of 40 tensors at random points, again and again, until one comes through; prints what each found there.
# The writers are forks of one process that has torch loaded already.
KILLER = """
import json, os, random, signal, sys, time, torch
from pathlib import Path
from loraforge.storage.atomic import new_folder
from loraforge.storage.leftovers import RESUME
from loraforge.storage.stream import TensorStream, header_space

out, part = Path(sys.argv[1]), Path(sys.argv[1]).with_name("." + Path(sys.argv[1]).name + ".part")
values = {f"layer.{i}": torch.randn(64, 96, generator=torch.Generator().manual_seed(i)) for i in range(40)}
space = header_space({key: (value.dtype, value.shape) for key, value in values.items()})

def write(out, resume, tell):
    with new_folder(out, resume=bool(resume), fingerprint={"seed": 1}) as folder:
        with TensorStream(folder / "x.safetensors", space, folder / RESUME / "journal") as stream:
            tell(len(stream.records))
            for key, value in values.items():
                if key not in stream.entries:
                    stream.append(key, value)
                    stream.mark(key)
                    tell(key)
                    time.sleep(0.003 if resume is not None else 0)
            stream.close()
        tell("closed")
        (folder / "run.json").write_text("{}")

KILLS = 12
write(out.with_name("whole"), None, lambda word: None)
chance, found = random.Random(7), []
for attempt in range(KILLS + 1):
    last = attempt == KILLS
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        write(out, attempt > 0, lambda word: os.write(theirs, f"{word} ".encode()))
        os._exit(0)
    os.close(theirs)
    if not last:
        wanted, seen = chance.randint(1, 8), b""
        while seen.count(b" ") < wanted and (more := os.read(ours, 64)):
            seen += more
        time.sleep(chance.random() * 0.002)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    seen = b"" if last else seen
    while more := os.read(ours, 4096):
        seen += more
    os.close(ours)
    head = part.joinpath("x.safetensors").read_bytes()[:8] if part.joinpath("x.safetensors").exists() else b""
    found.append([os.WTERMSIG(status), int(seen.split()[0]), b"closed" in seen, head.hex(), out.exists()])
    if out.exists():
        break
print(json.dumps(found))
"""


def names(place: Path) -> set[str]:
    return {entry.name for entry in place.iterdir()}


def leave(out: Path, fingerprint: dict[str, object] | None = PRINT) -> Path:
    """What a killed run leaves, made by an interrupted one."""
    with pytest.raises(KeyboardInterrupt), new_folder(out, resume=True, fingerprint=fingerprint) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    return out.with_name(f".{out.name}.part")


def test_an_interrupted_run_is_taken_up(tmp_path: Path) -> None:
    left = leave(tmp_path / "deep" / "out")
    assert left.is_dir()
    with new_folder(tmp_path / "deep" / "out", resume=True, fingerprint=PRINT) as folder:
        assert folder == left and (folder / "half").read_text() == "half" and (folder / RESUME).is_dir()
    assert names(tmp_path / "deep") == {"out"} and names(tmp_path / "deep" / "out") == {"half"}


def test_without_resume_a_leftover_is_removed(tmp_path: Path) -> None:
    leave(tmp_path / "out")
    with new_folder(tmp_path / "out", fingerprint=PRINT) as folder:
        assert names(folder) == {RESUME}
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, LoraforgeError])
def test_only_an_interruption_that_may_be_resumed_leaves_anything(tmp_path: Path, failure: type[BaseException]) -> None:
    for resume, fingerprint in ((False, PRINT), (True, None), (failure is LoraforgeError, PRINT)):
        with pytest.raises(failure), new_folder(tmp_path / "d" / "out", resume=resume, fingerprint=fingerprint):
            raise failure("x")
        assert names(tmp_path) == set()


@pytest.mark.parametrize("failure", [OSError, LoraforgeError, KeyboardInterrupt])
def test_what_is_worth_keeping_stays_after_any_failure(tmp_path: Path, failure: type[BaseException]) -> None:
    seen = []
    for worth in (False, True):

        def keep(part: Path, worth: bool = worth) -> bool:
            seen.append((part / "half").read_text(encoding="utf-8"))
            return worth

        expected = LoraforgeError if failure is OSError else failure
        with (
            pytest.raises(expected),
            new_folder(tmp_path / "out", fingerprint=PRINT, keep=keep) as folder,
        ):
            (folder / "half").write_text("x", encoding="utf-8")
            raise failure("no")
        assert [path.name for path in tmp_path.iterdir()] == ([".out.part"] if worth else [])
    assert seen == ["x", "x"]
    with new_folder(tmp_path / "out", resume=True, fingerprint=PRINT, keep=lambda part: True) as folder:
        assert (folder / "half").read_text(encoding="utf-8") == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_fingerprint_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    left = leave(tmp_path / "out")
    other = {"inputs": ["a", "c"], "seed": 1, "rank": 4}
    with (
        pytest.raises(LoraforgeError, match="another one") as caught,
        new_folder(tmp_path / "out", resume=True, fingerprint=other),
    ):
        raise AssertionError("not reached")
    assert caught.value.got == 'inputs was ["a", "b"], now ["a", "c"]; rank was null, now 4'
    assert (left / "half").is_file()
    with new_folder(tmp_path / "out", resume=True, fingerprint=PRINT) as folder:
        assert (folder / "half").is_file()


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\0"])
def test_a_damaged_fingerprint_is_a_fresh_start(tmp_path: Path, text: str) -> None:
    left = leave(tmp_path / "out")
    (left / RESUME / "fingerprint.json").write_text(text)
    with new_folder(tmp_path / "out", resume=True, fingerprint=PRINT) as folder:
        assert names(folder) == {RESUME}


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", resume=True, fingerprint=PRINT) as folder:
        (folder / "mine").write_text("x")
        code = f"from loraforge.storage.atomic import new_folder\nwith new_folder({str(tmp_path / 'out')!r}): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode != 0 and "Another run is writing this output" in other.stderr
        assert (folder / "mine").is_file()
    assert names(tmp_path) == {"out"}


def test_leftovers_of_any_kind_are_cleared(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    left = tmp_path / ".out.part"
    (left / "sub" / "deep").mkdir(parents=True)
    (left / "link").symlink_to(precious)
    with new_folder(tmp_path / "out") as folder:
        assert names(folder) == set()
    assert (precious / "file").is_file()


def test_a_link_in_the_place_of_the_temporary_folder_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    for entry in (tmp_path / ".out.part", tmp_path / ".other.part"):
        entry.symlink_to(precious) if entry.name == ".out.part" else entry.write_text("x")
        with (
            pytest.raises(LoraforgeError, match="could not be written"),
            new_folder(tmp_path / entry.name[1:].removesuffix(".part")),
        ):
            raise AssertionError("not reached")
        assert entry.exists() and names(precious) == {"file"}


def test_killed_at_random_points_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    attempts: list[tuple[int, int, bool, str, bool]] = [tuple(one) for one in json.loads(done.stdout)]
    *killed, last = attempts
    assert len(killed) >= 2 and all(one[0] == signal.SIGKILL for one in killed)
    for _, _, closed, head, published in killed:
        assert closed or head in ("", bytes(8).hex()), "no reader takes what is there"
        assert not published
    assert last[0] == 0 or last[2], "killed only after it was published"
    for before, after in pairwise(attempts):
        # One that is killed in the middle of publishing may have given up its journal.
        assert after[1] >= before[1] or (before[2] and after[1] in (0, 40)), (
            "none loses what the one before had written"
        )
    expected = (tmp_path / "whole" / "x.safetensors").read_bytes()
    assert (tmp_path / "out" / "x.safetensors").read_bytes() == expected
    assert names(tmp_path) == {"whole", "out"}
    assert names(tmp_path / "out") == {"x.safetensors", "run.json"}


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    write_whole(path, "old", private=True)
    assert path.read_text() == "old" and path.stat().st_mode & 0o777 == 0o600

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, b"new")
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("file", "old")]
