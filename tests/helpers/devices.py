"""Programs that run on eight devices, and what a compiled one sends between them."""

import json
import math
import os
import re
import subprocess
import sys

from helpers.files import TESTS

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def run_on_eight_devices(program):
    """What a program of tests/devices prints as JSON, in a process of eight CPU devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-W", "error", TESTS / "devices" / program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def collectives(compiled):
    """How often each kind occurs, and how many numbers are summed and gathered in all."""
    text, found = compiled.as_text(), {}
    for kind in KINDS:
        if results := re.findall(rf"= (.*?) {kind}(?:-start)?\(", text):
            found[kind] = len(results)
        if name := {"all-reduce": "numbers", "all-gather": "gathered"}.get(kind):
            shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(results))
            found[name] = sum(math.prod(map(int, s.split(","))) for s in shapes if s)
    return found
