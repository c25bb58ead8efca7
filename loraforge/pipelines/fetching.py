"""`loraforge.download`: fetches what a recipe reads from the Hugging Face hub, after saying what and how much."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loraforge.errors import LoraforgeError, raise_problems
from loraforge.pipelines import hub
from loraforge.pipelines.recipe import Pipeline, open_pipeline
from loraforge.pipelines.sources import DATASET, FILE, MODEL, Need, needs_of
from loraforge.pipelines.stages import Progress
from loraforge.pipelines.tables import write_split

# States of an item.
THERE, MISSING, FETCHED, BY_HAND = "there", "missing", "fetched", "by hand"
Tell = Callable[[str], None]


def download(
    source: str | Path,
    *,
    data: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    tell: Tell | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fetches base and data sets of a preset or recipe; calling it is the consent.

    The base goes into the hub's cache, data sets into `data`/hub as .jsonl files or folders of images. What is there
    stays; an interrupted call is continued by the next one.

    Args:
        source: Preset, or recipe file.
        data: Folder that relative paths are counted from; default the recipe's own folder, for presets the current one.
        settings: As for `run_pipeline`.
        dry_run: Say what is missing and what is known of it; no network is used.
        tell: Called with a line for every item before it is fetched: name, size, licence.
        progress: Called with (stage, detail, done, total).

    Returns:
        {name, data, items: [{name, kind, state, place, files, bytes, licence, from, note, size}], bytes}; a state is
        "there", "fetched" (with `dry_run`: "missing") or "by hand": only the user can bring it.

    Raises:
        UsageError: Unknown preset or key.
        LoraforgeError: The hub cannot be reached or has no such thing; nothing half is left.
    """
    pipeline = open_pipeline(source, data=data, settings=settings)
    return fetch(pipeline, dry_run=dry_run, tell=tell, progress=progress)


def fetch(
    pipeline: Pipeline, *, dry_run: bool = False, tell: Tell | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """`download` for a recipe that is read already."""
    needs = needs_of(pipeline)
    items = [_item(need) for need in needs]
    wanted = [(need, item) for need, item in zip(needs, items, strict=True) if item["state"] == MISSING]
    if not dry_run:
        # All listings first: what is missing on the hub is known before anything is fetched.
        listings = [_listing(need) for need, _ in wanted]
        for listing, (need, item) in zip(listings, wanted, strict=True):
            item |= {"bytes": listing.bytes, "files": len(listing.files), "licence": listing.licence or item["licence"]}
            if tell is not None:
                tell(_line(need, item))
        for listing, (need, item) in zip(listings, wanted, strict=True):
            item |= {"state": FETCHED, "place": str(_fetch(need, listing, pipeline, progress))}
    fetched = sum(item["bytes"] or 0 for item in items if item["state"] == FETCHED)
    return {"name": pipeline.name, "data": str(pipeline.data), "items": items, "bytes": fetched}


def check_present(pipeline: Pipeline) -> None:
    """Refuses a pipeline whose base or data are not there.

    Raises:
        LoraforgeError: Everything that is missing, at once, with where it is to be had.
    """
    raise_problems(
        [
            LoraforgeError(
                f"{'the base' if need.kind == MODEL else 'a source of the tasks'} is not there",
                where=need.name,
                got=_about(need.known) or None,
                hint=_how(need, pipeline),
            )
            for need in needs_of(pipeline)
            if need.place is None
        ]
    )


def _how(need: Need, pipeline: Pipeline) -> str:
    if need.kind == FILE:
        source = need.known.get("from")
        return f"fetch it from {source}" if source else "check the path; relative ones are counted from --data"
    what = "a folder of your own (--base)" if need.kind == MODEL else "files of your own (--set tasks.ID.train=FILE)"
    return f"loraforge download {pipeline.words} fetches it; or name {what}"


def _item(need: Need) -> dict[str, Any]:
    state = THERE if need.place is not None else BY_HAND if need.kind == FILE else MISSING
    place = None if need.place is None else str(need.place)
    known = {key: need.known.get(key) for key in ("licence", "from", "note", "size")}
    return {"name": need.name, "kind": need.kind, "state": state, "place": place, "files": None, "bytes": None, **known}


def _line(need: Need, item: Mapping[str, Any]) -> str:
    size = f"{item['bytes'] / 1e6:.1f} MB in {item['files']} files"
    note = f"; {item['note']}" if item["note"] else ""
    return f"{need.name}: {size}, licence: {item['licence'] or 'not stated, see its page'}{note}"


def _about(known: Mapping[str, Any]) -> str:
    return "; ".join(f"{key}: {known[key]}" for key in ("size", "licence", "note") if known.get(key))


def _listing(need: Need) -> hub.Listing:
    return hub.list_model(need.name) if need.kind == MODEL else hub.list_split(need.name)


def _fetch(need: Need, listing: hub.Listing, pipeline: Pipeline, progress: Progress | None) -> Path:
    """Fetches one item; returns where it lies."""
    if need.kind != DATASET:
        hub.fetch_model(listing, progress)
        found = hub.cached_model(need.name)
        if found is None:
            raise LoraforgeError("the fetched model is not in the hub's cache", where=need.name)
        return found
    place = hub.read_address(need.name).place(pipeline.data)
    # Kept until it is converted: a broken transfer goes on from there.
    transfer = place.with_name(f".{place.name}.fetch")
    files = hub.fetch_split(listing, transfer, progress)
    written, _ = write_split(files, place)
    shutil.rmtree(transfer)
    return written
