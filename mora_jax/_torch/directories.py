"""Directories that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


def check_new(directory: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path of a directory in which nothing is yet.

    Raises:
      ValueError: where something has this name, be it a broken link.
    """
    path = pathlib.Path(directory).absolute()
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already; save to a new directory.")
    return path


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory that gets its name when all is in it, and is gone where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        new = pathlib.Path(scratch) / path.name
        new.mkdir()  # not the scratch itself, which nobody else may read
        yield new
        new.rename(path)
