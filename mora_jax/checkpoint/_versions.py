"""Where saved adapters lie: in a directory of their own, or by name and version in one of many.

library/poems/1/
library/poems/2/
library/poems/.3.is_being_saved/      claimed by a program that writes version 3
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from mora_jax._arrays.paths import list_paths

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: Any) -> None:
    """Raises ValueError unless adapters can have this name."""
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"name={name!r} is no name for adapters: up to 100 letters, digits, '.', '_' and '-', "
            "a letter or digit first."
        )


def check_room(path: epath.Path, name: str | None) -> None:
    """Raises ValueError unless adapters, of this name or without one, can be saved at a path."""
    if name is None and path.exists():
        raise exists_already(path)
    if name is not None:
        check_name(name)
        for folder in (path, path / name):
            if is_checkpoint(folder):
                raise ValueError(f"{folder} is a saved adapter itself, and cannot hold named ones.")
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file, and cannot hold adapters.")


def exists_already(path: epath.Path) -> ValueError:
    """What is raised where something lies at a path already."""
    return ValueError(
        f"{path} exists already, and is not overwritten. Save to a new directory; or give a name, "
        "save_adapters(..., name='mine'), which keeps every save as a version of it; or remove "
        f"this one first, such as with shutil.rmtree({str(path)!r})."
    )


@contextlib.contextmanager
def new_unnamed(path: epath.Path) -> Iterator[epath.Path]:
    """Where to write what is to lie at a path, which it gets when it is whole.

    Programs that save to one path would delete each other's files: each writes to a name of its
    own, and one of them gets the path. The processes of one program write together, and a bucket
    cannot rename directories: there it is the path itself.

    Raises:
      ValueError: where another program was faster.
    """
    if jax.process_count() > 1 or "://" in str(path):
        yield path
        return
    own = path.parent / f".{path.name}.{uuid.uuid4().hex}.is_being_saved"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield own
        try:
            os.rename(own, path)
        except OSError as error:
            if path.exists():
                raise exists_already(path) from error
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)


def is_checkpoint(path: epath.Path) -> bool:
    """Whether a directory is one checkpoint, whole or damaged."""
    return any((path / file).exists() for file in ("_CHECKPOINT_METADATA", "orbax.checkpoint"))


def names_in(path: epath.Path) -> list[str]:
    """The names that have a version."""
    return sorted(p.name for p in path.iterdir() if _NAME.fullmatch(p.name) and versions_of(p))


def versions_of(path: epath.Path) -> list[int]:
    """The versions there are; what Orbax has not finished has another name than a number."""
    names = [p.name for p in path.iterdir()] if path.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]*", name))


def find_saved(path: epath.Path, name: str | None, version: int | None) -> epath.Path:
    """The directory of one checkpoint, the newest of a name unless a version is given.

    Raises:
      FileNotFoundError: where there is none.
      ValueError: where several are there and no name is given, or a version of no name.
    """
    if name is None:
        if version is not None:
            raise ValueError(f"version={version} of which name? There are {_has(path)}.")
        if not path.exists():
            raise FileNotFoundError(f"no adapters at {path}.")
        if not is_checkpoint(path) and path.is_dir() and names_in(path):
            raise ValueError(f"{path} holds several adapters; pass name=, one of {_has(path)}.")
        return path
    check_name(name)
    versions = versions_of(path / name)
    if not versions:
        raise FileNotFoundError(f"no adapters {name!r} at {path}; there are {_has(path)}.")
    if version is not None and version not in versions:
        raise FileNotFoundError(f"no version {version!r} of {name!r} at {path}: {versions}.")
    return path / name / str(versions[-1] if version is None else version)


def _has(path: epath.Path) -> str:
    return list_paths(names_in(path) if path.is_dir() else ()) or "none"


@contextlib.contextmanager
def new_version(path: epath.Path) -> Iterator[int]:
    """A version of a name that no other program writes.

    Two that took the same one would delete each other's files. A directory is made by one of them
    alone (on file systems; buckets have no such thing). What a killed program leaves of it costs a
    number. The processes of one program take the same version.
    """
    version = max(versions_of(path), default=0) + 1
    if jax.process_count() > 1:
        yield version
        return
    while True:
        claim = path / f".{version}.is_being_saved"
        try:
            claim.mkdir(parents=True)
        except FileExistsError:
            version += 1
            continue
        if not (path / str(version)).exists():
            break
        claim.rmdir()  # saved while we looked
        version += 1
    try:
        yield version
    finally:
        claim.rmdir()
