"""Runs the tests or an example in an environment of its own: Python 3.11 or newer, nothing else.

    python3 run.py test                      # the tests, two files at a time; or pytest's arguments
    python3 run.py test -m slow -n 2         # those that take ten seconds or more
    python3 run.py quickstart                # an example; without a name, lists them all
    python3 run.py memorize --method lora    # further arguments go to it

`examples/README.md` says what each example shows.

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
    "quickstart": "examples/quickstart.py",
    "with_nnx": "examples/with_nnx.py",
    "any_function": "examples/any_function.py",
    "remora": "examples/remora.py",
    "adapter_bank": "examples/adapter_bank.py",
    "quantised": "examples/quantised.py",
    "to_pytorch": "examples/to_pytorch.py",
    "memorize": "examples/memorize.py",
    "custom_scheme": "examples/custom_scheme.py",
    "train": "examples/train/train_llama.py",
    "finetune": "examples/finetune/finetune_llama.py",
    "spectrum": "examples/analysis/spectrum.py",
    "allocate": "examples/analysis/allocate.py",
    "uuid_pairs": "examples/paper/uuid_pairs.py",
    "mathematics": "examples/paper/mathematics.py",
    "biomedicine": "examples/paper/biomedicine.py",
    "pretrain": "examples/paper/pretrain.py",
    "parallel": "examples/paper/parallel.py",
    "rank": "examples/paper/rank.py",
    "step": "examples/benchmarks/step.py",
    "generate": "examples/benchmarks/generate.py",
    "adapters": "examples/benchmarks/adapters.py",
}
EXTRAS = {"test": "test"} | dict.fromkeys(SCRIPTS, "examples")
EXTRAS["quantised"] = "examples,quantized"

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
        print(__doc__, f"Examples: {', '.join(SCRIPTS)}", sep="\n")
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
