"""The benchmarks run, on tiny layers, and write what they print. No timing is looked at."""

import json
import os
import subprocess
import sys

import pytest

from helpers.files import ROOT

#: Run by `python3 run.py test -m slow`.
pytestmark = pytest.mark.slow


def run(script, *arguments):
    path = ROOT / "examples" / "benchmarks" / script
    fixed = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, path, "--tiny", *map(str, arguments)],
        env={**os.environ, **fixed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_step(tmp_path):
    rows, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    flags = ("--tokens", 64, "--rank", 2, "--repeats", 1, "--repeat-seconds", 0, "--json", rows)
    flags += ("--picture", picture)
    table = run("step.py", *flags, "--schemes", "lora", "sharing", "--placements", "auto")
    written = json.loads(rows.read_text())
    assert [(r["remat"], r["scheme"]) for r in written["rows"]] == [
        (remat, scheme) for remat in (False, True) for scheme in ("baseline", "lora", "sharing")
    ]
    assert all(row["ms"] > 0 and row["temp_gb"] > 0 for row in written["rows"])
    assert written["machine"]["device"] in table
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_generate(tmp_path):
    rows = tmp_path / "rows.json"
    flags = (
        "--repeats",
        1,
        "--batch",
        2,
        "--prompt",
        4,
        "--new",
        4,
        "--schemes",
        "cycled",
        "--json",
        rows,
    )
    table = run("generate.py", *flags)
    written = json.loads(rows.read_text())
    assert [row["variant"] for row in written["rows"]] == ["baseline", "cycled auto", "merged"]
    assert "batch 2" in table


def test_adapters(tmp_path):
    rows = tmp_path / "rows.json"
    flags = ("--repeats", 1, "--adapters", 3, "--tokens", 2, "--switches", 2, "--json", rows)
    table = run("adapters.py", *flags, "--dtype", "float32")
    (case,) = json.loads(rows.read_text())["cases"]
    assert [row["variant"] for row in case["rows"]] == ["base", "kernel", "activation", "mixed"]
    assert case["compilations"] == 0
    assert case["bank_gb"] == pytest.approx(3 * case["adapter_gb"])
    assert all(row["differs"] < 1e-5 for row in case["rows"])
    assert "3 examples of 2 tokens" in table


def test_pod(tmp_path):
    rows = tmp_path / "rows.json"
    table = run("pod.py", "--schemes", "sharing", "--json", rows)
    baseline, sharing = json.loads(rows.read_text())["rows"]
    assert "tiny, 2 layers on cpu-8" in table
    # For 32 tokens, 16 a sequence, on 2 parts: kernels forward, again in the backward but for the
    # last one of a layer, and for the inputs' gradients; 8 products of attention; the head.
    kernels = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
    layer = 3 * kernels - 160 * 64 + 8 * 16 * 64
    assert baseline["step"]["tflop"] * 1e12 == 2 * 32 * (2 * layer + 2 * 64 * 256) / 2
    # The forward pass sends nothing that the baseline does not, and a merge nothing at all.
    assert sharing["forward"] == baseline["forward"]
    assert baseline["forward"]["all-gather"]["count"] == 2 * 7 + 1  # kernels in parts, and the head
    merge = sharing["merge"]
    assert merge["shardings_kept"]
    assert merge["collectives"] == {}
