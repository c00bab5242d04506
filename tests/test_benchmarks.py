"""The benchmarks run, on tiny layers, and write what they print. No timing is looked at."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run(script, *arguments):
    path = ROOT / "examples" / "benchmarks" / script
    done = subprocess.run(
        [sys.executable, path, "--tiny", "--turns", "1", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_step(tmp_path):
    rows, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    flags = ("--tokens", 64, "--rank", 2, "--turn-seconds", 0, "--json", rows, "--picture", picture)
    table = run("step.py", *flags, "--schemes", "lora", "sharing", "--placements", "auto")
    written = json.loads(rows.read_text())
    assert [(r["remat"], r["scheme"]) for r in written["rows"]] == [
        (remat, scheme) for remat in (False, True) for scheme in ("floor", "lora", "sharing")
    ]
    assert all(row["ms"] > 0 and row["temp_gb"] > 0 for row in written["rows"])
    assert written["machine"]["device"] in table
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_generate(tmp_path):
    rows = tmp_path / "rows.json"
    flags = ("--batch", 2, "--prompt", 4, "--new", 4, "--schemes", "cycled", "--json", rows)
    table = run("generate.py", *flags)
    written = json.loads(rows.read_text())
    assert [row["variant"] for row in written["rows"]] == ["floor", "cycled auto", "merged"]
    assert "batch 2" in table
