"""An optional module without its extra says how to install it."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

#: Which extra misses which module.
MISSING = [
    ("peft", "safetensors"),
    ("export", "safetensors"),
    ("checkpoint", "orbax"),
    ("quantized", "qwix"),
]

IMPORT = """
import importlib, json, sys, mora_jax

class Blocked:
    module = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == cls.module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def error_of(extra, module):
    for name in list(sys.modules):
        if name.startswith(("mora_jax.peft", "mora_jax.export", module)):
            del sys.modules[name]
    Blocked.module = module
    try:
        importlib.import_module("mora_jax." + extra)
    except ImportError as error:
        return str(error), error.name, getattr(error.__cause__, "name", None)

sys.meta_path.insert(0, Blocked)
missing = [error_of(*case) for case in json.loads(sys.argv[1])]
broken = ["mora_jax._torch.names", "safetensors._safetensors_rust"]
broken = [error_of("peft", module) for module in broken]
print(json.dumps([missing, broken]))
"""


def test_a_missing_extra_says_how_to_install_it():
    command = [sys.executable, "-c", IMPORT, json.dumps(MISSING)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    missing, broken = json.loads(done.stdout)
    for (extra, module), (message, name, cause) in zip(MISSING, missing, strict=True):
        install = f"pip install 'mora_jax[{extra}]'"
        assert message == f"mora_jax.{extra} needs {module}; run {install}"
        assert (name, cause) == (module, module)
    # Something else is broken: the error stays as it is.
    for (message, name, cause), module in zip(
        broken, ["mora_jax._torch.names", "safetensors._safetensors_rust"], strict=True
    ):
        assert "pip install" not in message
        assert (name, cause) == (module, None)
