"""Runs the tests or an example in an environment of its own: Python 3.11 or newer, nothing else.

    python3 run.py test                      # all tests, two files at a time; or pytest's arguments
    python3 run.py memorize                  # examples/memorize.py; further arguments go to it
    python3 run.py finetune                  # examples/finetune/finetune_llama.py, likewise
    python3 run.py allocate                  # examples/analysis/allocate.py, likewise
    python3 run.py spectrum DIRECTORY        # examples/analysis/spectrum.py, likewise
    python3 run.py train                     # examples/train/train_llama.py, likewise
    python3 run.py uuid_pairs                # examples/paper/uuid_pairs.py, and the others there
    python3 run.py step                      # examples/benchmarks/step.py; generate, adapters too

The first call makes `.venv` beside this file and installs the library there with what the tests and
examples need. Later calls start at once, until pyproject.toml changes.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
SCRIPTS = {
    "allocate": "examples/analysis/allocate.py",
    "memorize": "examples/memorize.py",
    "finetune": "examples/finetune/finetune_llama.py",
    "spectrum": "examples/analysis/spectrum.py",
    "train": "examples/train/train_llama.py",
    "uuid_pairs": "examples/paper/uuid_pairs.py",
    "mathematics": "examples/paper/mathematics.py",
    "biomedicine": "examples/paper/biomedicine.py",
    "pretrain": "examples/paper/pretrain.py",
    "parallel": "examples/paper/parallel.py",
    "step": "examples/benchmarks/step.py",
    "generate": "examples/benchmarks/generate.py",
    "adapters": "examples/benchmarks/adapters.py",
}
EXTRAS = {"test": "test"} | dict.fromkeys(SCRIPTS, "examples")

#: On a CPU XLA takes its buffers from malloc at every step, and glibc returns them to the kernel.
#: In pages of 2 MB instead of 4 KB that costs the kernel half as much, and `memorize` takes a tenth
#: less time. What is no glibc, or an older one than 2.35, does not know the word; a value of the
#: user's stands.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def python_with(extra: str) -> pathlib.Path:
    """The environment's Python, after installing the library with an extra of pyproject.toml."""
    folder = "Scripts" if os.name == "nt" else "bin"
    python = ENVIRONMENT / folder / "python"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = ENVIRONMENT / f"installed-{extra}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing mora_jax[{extra}] into {ENVIRONMENT} ...", flush=True)
    venv.create(ENVIRONMENT, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--editable", f"{ROOT}[{extra}]"], check=True)
    stamp.write_text(wanted)
    return python


def main() -> int:
    """Runs the command and gives its exit status."""
    if sys.version_info < (3, 11):
        print(f"mora_jax needs Python 3.11 or newer, this is {sys.version.split()[0]}")
        return 2
    if len(sys.argv) < 2 or sys.argv[1] not in EXTRAS:
        print(__doc__)
        return 2
    name, arguments = sys.argv[1], sys.argv[2:]
    python = python_with(EXTRAS[name])
    program = ["-m", "pytest"] if name == "test" else [str(ROOT / SCRIPTS[name])]
    if name == "test" and not arguments:
        arguments = ["-n", "2", "--dist", "loadfile"]
    folder = ROOT if name == "test" else None
    command, variables = [python, *program, *arguments], LARGE_PAGES | os.environ
    return subprocess.run(command, check=False, cwd=folder, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
