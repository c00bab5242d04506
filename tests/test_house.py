"""The house: a file imports only from floors below its own."""

import ast
import pathlib
import subprocess
import sys

import mora_jax

PACKAGE = pathlib.Path(mora_jax.__file__).parent

FLOORS = [
    {"_schemes", "_features", "_mesh", "_tree", "_schedules", "_rewrite", "_variables", "_version"}
    | {"_table", "_new_directory"},
    {"_groups", "_cycles", "_initialize", "_merge_loss", "_rounding", "_safetensors"}
    | {"_checkpoint_versions"},
    {"_blocks", "_checksums", "_prune"},
    {"_operators", "_placement"},
    {"_layout", "_ragged", "_examples"},
    {"_config", "_magnitude", "_torch_names", "_peft_config"},
    {"_dot_call"},
    {"_dot_gradient", "_plan", "_peft_read", "_peft_write", "_torch_tensors"},
    {"_dot"},
    {"_params", "_freeze", "_optimizer_state", "_views", "_nnx_kernels", "_quantize", "_layers"}
    | {"_decomposition", "_checkpoint_record"},
    {"_linen_layers", "_function", "_nnx_layers", "_merge", "_bank"},
    {"linen", "_remora", "_unmerge", "_hugging_face", "_one_tensor", "_projection"}
    | {"_spectrum", "_allocate"},
    {"_linen_plan", "nnx"},
    {"_adapt", "checkpoint", "peft", "quantized", "sharding"},
    {"export"},
    {"__init__"},
]


def imports_of(path):
    """The modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mora_jax"):
            inner = node.module.removeprefix("mora_jax").lstrip(".")
            yield from [inner] if inner else [alias.name for alias in node.names]


def test_floors_look_down():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set().union(*FLOORS)
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    for path in PACKAGE.glob("*.py"):
        for imported in imports_of(path):
            assert floor_of[imported] < floor_of[path.stem], f"{path.stem} imports {imported}"


def test_the_facade_opens_no_door():
    doors = {"mora_jax." + name for name in ("checkpoint", "export", "peft", "quantized")}
    doors |= {"orbax", "qwix", "safetensors"}
    code = f"import sys, mora_jax; assert not {doors} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_facade_names_what_it_gives():
    assert sorted(mora_jax.__all__) == mora_jax.__all__
    assert all(hasattr(mora_jax, name) for name in mora_jax.__all__)
