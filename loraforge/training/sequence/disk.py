"""A disk that refuses while a run is written, in words of the run."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from loraforge.errors import LoraforgeError

# What torch and safetensors say of a write that failed; neither raises OSError.
_SIGNS = ("PytorchStreamWriter", os.strerror(errno.ENOSPC))


@contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """Says of a refused write which run it was and how it goes on; what is whole on the disk stays.

    Raises:
        LoraforgeError: The disk refused.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = str(error).strip().split("\n")[0]
        if isinstance(error, RuntimeError) and not any(sign in text for sign in _SIGNS):
            raise
        raise LoraforgeError(
            "the run could not be written",
            where=getattr(error, "filename", None) or folder,
            got=getattr(error, "strerror", None) or text or type(error).__name__,
            hint="free space there; the same command goes on from the last whole checkpoint",
        ) from error
