"""Writing files that are either whole or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replknet._errors import RunError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder that takes `path`'s place when the block ends without an error.

    The data reach the disk before the rename, so that a crash of the machine, too, leaves one of the two files whole.
    Missing folders are made.

    Raises:
        RunError: there can be no such folder.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        permit_as_usual(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it unless they are there.

    Raises:
        RunError: a file is in the way, the place is read-only or the disk full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the folder {path} cannot be made: {error.strerror}; choose another place") from error


def permit_as_usual(path: Path) -> None:
    """Give a file the permissions of any new one: some writers, safetensors' for one, let its owner alone read it."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Replace the contents of a text file, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
