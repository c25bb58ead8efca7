"""The Hugging Face hub: what a model or a split of a data set consists of, and fetching it.

Data sets are taken from the Parquet files that the hub itself makes of every public one (the branch
`refs/convert/parquet`), so no script of a data set is ever run; they are kept as plain local files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError
from loraforge.pipelines.stages import Progress

ADDRESS = re.compile(r"hf://(?P<name>[^#:]+)(#(?P<config>[^:]+))?(:(?P<split>.+))?")
CONVERTED = "refs/convert/parquet"
# What transformers reads beside the weights; anything else in a repository (pictures, other frameworks) stays there.
_BESIDE = re.compile(r"[^/]+\.(json|txt|model|tiktoken|jinja)|merges\.txt|tokenizer\..*")
_WEIGHTS = (re.compile(r"model[^/]*\.safetensors"), re.compile(r"pytorch_model[^/]*\.bin"))


@dataclass(frozen=True)
class Split:
    """The address of one split of a data set on the hub.

    Attributes:
        name: OWNER/NAME.
        config: Its configuration; None if it has only one.
        split: As "train".
    """

    name: str
    config: str | None
    split: str

    def place(self, data: Path) -> Path:
        """Where it lies below the data folder: a folder of images, or a file of this name with `.jsonl`."""
        return data / "hub" / self.name / (self.config or "default") / self.split


@dataclass(frozen=True)
class Listing:
    """What is to be fetched.

    Attributes:
        name: Model id, or address of the split.
        kind: "model" or "dataset".
        repository: OWNER/NAME on the hub.
        revision: Commit or branch.
        files: Paths in the repository and their sizes in bytes.
        licence: As its page states it, or None.
    """

    name: str
    kind: str
    repository: str
    revision: str
    files: tuple[tuple[str, int], ...]
    licence: str | None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size in self.files)


def read_address(address: str) -> Split:
    """The parts of `hf://NAME[#CONFIG][:SPLIT]`; the split is "train" if none is named.

    Raises:
        LoraforgeError: Not such an address.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise LoraforgeError("not the address of a data set", where=address, expected="hf://NAME[#CONFIG][:SPLIT]")
    return Split(match["name"], match["config"], match["split"] or "train")


def list_model(name: str) -> Listing:
    """The files of a model that transformers needs: configuration, tokenizer, one set of weights.

    Raises:
        LoraforgeError: The hub cannot be reached, has no such model, or it has no weights for PyTorch.
    """
    with _told(name):
        import huggingface_hub

        info = huggingface_hub.HfApi().model_info(name, files_metadata=True)
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    weights = next((kept for kind in _WEIGHTS if (kept := [path for path in sizes if kind.fullmatch(path)])), None)
    if weights is None:
        raise LoraforgeError(
            "the model has no weights that PyTorch reads", where=name, got=", ".join(sizes) or "no file"
        )
    chosen = sorted({*weights, *(path for path in sizes if _BESIDE.fullmatch(path))})
    return Listing(name, "model", name, str(info.sha), tuple((p, sizes[p]) for p in chosen), _licence(info))


def list_split(address: str) -> Listing:
    """The Parquet files of a split of a data set.

    Raises:
        LoraforgeError: The hub cannot be reached, has no such data set, configuration or split.
    """
    split = read_address(address)
    with _told(address):
        import huggingface_hub

        api = huggingface_hub.HfApi()
        info = api.dataset_info(split.name)
        tree = api.list_repo_tree(split.name, recursive=True, revision=CONVERTED, repo_type="dataset")
        sizes = {entry.path: int(entry.size) for entry in tree if getattr(entry, "size", None) is not None}
    found = {path: tuple(path.split("/")) for path in sorted(sizes) if path.endswith(".parquet")}
    configs = sorted({parts[0] for parts in found.values() if len(parts) == 3})
    config = split.config or (configs[0] if len(configs) == 1 else "default")
    files = tuple((path, sizes[path]) for path, parts in found.items() if parts[:2] == (config, split.split))
    if not files:
        known = sorted({f"{parts[0]}: {parts[1]}" for parts in found.values() if len(parts) == 3})
        got = f"{config}, {split.split}"
        raise LoraforgeError(
            "the data set has no such split", where=address, got=got, expected="; ".join(known) or None
        )
    return Listing(address, "dataset", split.name, CONVERTED, files, _licence(info))


def fetch_model(listing: Listing, progress: Progress | None = None) -> None:
    """Fetches a model into the hub's cache, where its id finds it.

    Raises:
        LoraforgeError: The hub cannot be reached, or the disk refuses.
    """
    for path in _fetch(listing, {"revision": listing.revision}, progress):
        del path


def fetch_split(listing: Listing, folder: Path, progress: Progress | None = None) -> list[Path]:
    """Fetches the Parquet files of a split into a folder; a second call goes on where the first was broken.

    Raises:
        LoraforgeError: The hub cannot be reached, or the disk refuses.
    """
    place = {"revision": listing.revision, "repo_type": "dataset", "local_dir": str(folder)}
    return list(_fetch(listing, place, progress))


def cached_model(name: str) -> Path | None:
    """The folder of a model in the hub's cache, with configuration and weights; None where it is not there."""
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if any(kind.fullmatch(path.name) for kind in _WEIGHTS for path in folder.iterdir()) else None


def _fetch(listing: Listing, place: dict[str, str], progress: Progress | None) -> Iterator[Path]:
    for done, (path, size) in enumerate(listing.files):
        if progress is not None:
            progress("download", f"{listing.name} {path} ({size / 1e6:.0f} MB)", done, len(listing.files))
        with _told(listing.name):
            import huggingface_hub

            found = huggingface_hub.hf_hub_download(listing.repository, path, **place)
        yield Path(found)


def _licence(info: Any) -> str | None:
    card = info.card_data
    found = card.get("license") if card is not None else None
    if isinstance(found, list):
        return ", ".join(map(str, found))
    return None if found is None else str(found)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turns the hub's errors into ones that say what to do."""
    try:
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    except ImportError as error:
        raise LoraforgeError("fetching needs the library 'huggingface_hub'", where=name) from error
    # Its own errors, those of whichever client it is built on, and the system's.
    failures = (OSError, ValueError, *HfHubHTTPError.__bases__)
    try:
        yield
    except GatedRepoError as error:
        hint = f"accept the terms on https://huggingface.co/{name}, then: hf auth login"
        raise LoraforgeError(
            "the hub gives this only to those who accepted its terms", where=name, hint=hint
        ) from error
    except RepositoryNotFoundError as error:
        raise LoraforgeError("the hub has no such model or data set (or it is private)", where=name) from error
    except failures as error:
        raise LoraforgeError(
            "the hub cannot be reached or refuses",
            where=name,
            got=(str(error).strip() or type(error).__name__).split("\n")[0],
            hint="check the connection (HF_HUB_OFFLINE must not be set); what is fetched already is kept",
        ) from error
