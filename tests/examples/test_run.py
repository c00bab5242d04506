"""What `run.py` starts programs with."""

import pathlib
import subprocess
import sys

import pytest

import run
from helpers.files import ROOT


@pytest.mark.parametrize("own", [None, "glibc.malloc.tcache_count=0"])
def test_pages_are_large_unless_the_user_says_otherwise(monkeypatch, own):
    called = []
    monkeypatch.setattr(run, "python_with", lambda extra: pathlib.Path("python"))
    monkeypatch.setattr(sys, "argv", ["run.py", "memorize", "--steps", "1"])
    monkeypatch.setenv("OTHER", "7")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)

    def start(command, **how):
        called.append((command, how["env"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", start)
    assert run.main() == 3
    ((command, variables),) = called
    assert command[1:] == [str(ROOT / "examples/memorize.py"), "--steps", "1"]
    assert variables["GLIBC_TUNABLES"] == (own or "glibc.malloc.hugetlb=1")
    assert variables["OTHER"] == "7"


def test_every_name_is_a_script_that_the_examples_table_has():
    table = (ROOT / "examples" / "README.md").read_text()
    for name, path in run.SCRIPTS.items():
        assert (ROOT / path).is_file()
        assert f"run.py {name}`" in table or f"`{name}`" in table or f"run.py {name} " in table
    for path in (ROOT / "examples").glob("*.py"):
        assert f"examples/{path.name}" in run.SCRIPTS.values()
