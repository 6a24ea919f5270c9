"""Atomic writes: a file appears whole and on the disk, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, once: bool = False) -> Iterator[Path]:
    """A temporary file to write to; at the block's end it is synced and replaces `path`.

    Args:
        once: refuse to replace an existing file.

    Raises:
        FileExistsError: `once`, and it exists.
        OSError: disk full, no permission; `path` is unchanged then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        if once:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk itself, so that a power cut loses nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
