"""A stand-in of the Hugging Face hub: repositories in a folder, served by functions of the real names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError


class Hub:
    """Models and data sets below `folder`; `cache` is what was fetched."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache = folder / "served", folder / "cache"
        self.licences: dict[str, Any] = {}
        self.fetched: list[str] = []
        self.fails_at: str | None = None
        self.error: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.try_to_load_from_cache)

    def model_info(self, name: str, files_metadata: bool = False) -> Any:
        return self._info(name, [(str(p.relative_to(self._at(name))), p.stat().st_size) for p in self._files(name)])

    def dataset_info(self, name: str) -> Any:
        return self._info(name, [])

    def list_repo_tree(self, name: str, *, recursive: bool, revision: str, repo_type: str) -> Iterator[Any]:
        assert (recursive, revision, repo_type) == (True, "refs/convert/parquet", "dataset")
        for path in self._files(name):
            yield SimpleNamespace(path=str(path.relative_to(self._at(name))), size=path.stat().st_size)
        yield SimpleNamespace(path="default")  # a folder has no size

    def hf_hub_download(
        self, name: str, path: str, *, revision: str, repo_type: str = "model", local_dir: str | None = None
    ) -> str:
        if path == self.fails_at:
            raise self.error or ConnectionError("the line is dead")
        place = self.cache / name if local_dir is None else Path(local_dir)
        target = place / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._at(name) / path, target)
            self.fetched.append(f"{name}/{path}")
        return str(target)

    def try_to_load_from_cache(self, name: str, path: str) -> str | None:
        found = self.cache / name / path
        return str(found) if found.exists() else None

    def _info(self, name: str, files: list[tuple[str, int]]) -> Any:
        if self.error is not None and self.fails_at is None:
            raise self.error
        if not self._at(name).is_dir():
            response = SimpleNamespace(headers={}, request=None, status_code=404, text="")
            raise RepositoryNotFoundError("404", response=response)  # type: ignore[arg-type]
        card = {"license": self.licences[name]} if name in self.licences else None
        siblings = [SimpleNamespace(rfilename=path, size=size) for path, size in files]
        return SimpleNamespace(sha="f00d", siblings=siblings, card_data=card)

    def _at(self, name: str) -> Path:
        return self.folder / name

    def _files(self, name: str) -> list[Path]:
        return sorted(path for path in self._at(name).rglob("*") if path.is_file())
