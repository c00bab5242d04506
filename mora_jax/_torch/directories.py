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
        raise exists_already(path)
    return path


def exists_already(path: pathlib.Path) -> ValueError:
    """What is raised where something lies at a path already."""
    return ValueError(
        f"{path} exists already, and is not overwritten: save to a new directory, or remove this "
        f"one first, such as with shutil.rmtree({str(path)!r})."
    )


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory that gets its name when all is in it, and is gone where that fails.

    Raises:
      ValueError: where another program has taken the name in the meantime.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        new = pathlib.Path(scratch) / path.name
        new.mkdir()  # not the scratch itself, which nobody else may read
        yield new
        try:
            new.rename(path)
        except OSError as error:
            if os.path.lexists(path):  # saved by another program in the meantime
                raise exists_already(path) from error
            raise
