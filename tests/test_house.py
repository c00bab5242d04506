"""The house: folders are floors, and a file imports from below or from its own folder."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import mora_jax
from mora_jax._schemes.registry import SCHEMES

PACKAGE = pathlib.Path(mora_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: The folders and the files beside them, from the ground up. Those of one floor know nothing of
#: each other. All else is read from the tree.
FLOORS = [
    {"_arrays", "_compat", "_text", "_version"},
    {"_schemes"},
    {"_product"},
    {"_torch", "_plans"},
    {"_params"},
    {"_merging", "_analysis", "_tracing", "peft", "checkpoint", "sharding"},
    {"linen", "nnx", "quantized", "export"},
    {"_adapt"},
    {"__init__"},
]


def name_of(path):
    """A file as in error messages: `_arrays/mesh.py`."""
    return path.relative_to(PACKAGE).as_posix()


def room_of(path):
    """The folder that a file stands in, or the file itself where it stands beside the folders."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def file_of(*parts):
    """The file of a module, None where it is none."""
    found = PACKAGE.joinpath(*parts, "__init__.py"), PACKAGE.joinpath(*parts).with_suffix(".py")
    return next((path for path in found if path.is_file()), None)


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_of(path, *, of_types):
    """The files of the package that a file imports, in functions too; or for its types as well."""
    waiting, modules = [ast.parse(path.read_text())], []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)} has a relative import"
            # What is imported may be a module itself, or a name in one.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            ours = node.module.partition(".")[0] == "mora_jax"
            modules += [m if ours and file_of(*m.split(".")[1:]) else node.module for m in whole]
        children = ast.iter_child_nodes(node)
        waiting += node.orelse if is_for_types(node) and not of_types else children
    ours = [module.split(".")[1:] for module in modules if module.partition(".")[0] == "mora_jax"]
    return {file_of(*parts) for parts in ours}


def names_in(node):
    """Every `x`, and the `y` of every `x.y`, in the code below a node."""
    return {
        inner.id if isinstance(inner, ast.Name) else inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name | ast.Attribute)
    }


def scheme_classes():
    """The names of the built-in schemes' classes; tests may have registered others."""
    ours = [cls for cls in SCHEMES.values() if cls.__module__.startswith("mora_jax.")]
    return {cls.__name__ for cls in ours}


def test_every_file_lies_on_a_floor():
    rooms = [room for floor in FLOORS for room in floor]
    assert sorted(rooms) == sorted({room_of(path) for path in FILES})


def test_floors_look_down():
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    for path in FILES:
        for imported in imports_of(path, of_types=True):
            own, other = room_of(path), room_of(imported)
            below = floor_of[other] < floor_of[own]
            assert own == other or below, f"{name_of(path)} imports {name_of(imported)}"


def test_files_of_a_folder_import_each_other_in_one_direction():
    graph = {
        name_of(path): {
            name_of(imported)
            for imported in imports_of(path, of_types=False)
            if room_of(imported) == room_of(path)
        }
        for path in FILES
    }
    [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError, and names the files


def test_no_file_beside_the_schemes_asks_for_a_schemes_class():
    """What differs from scheme to scheme is a method or a flag of the scheme."""
    classes = scheme_classes()
    for path in FILES:
        if room_of(path) == "_schemes":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            asked = set()
            if isinstance(node, ast.Call) and names_in(node.func) & {"isinstance", "issubclass"}:
                asked = set().union(*map(names_in, node.args[1:]))
            elif isinstance(node, ast.MatchClass):
                asked = names_in(node.cls)
            assert not asked & classes, f"{name_of(path)}: {ast.unparse(node)}"


def test_the_engine_and_the_tracer_name_no_scheme():
    classes = scheme_classes()
    for path in (path for path in FILES if room_of(path) in ("_product", "_tracing")):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        named = names_in(tree) | {alias.name for node in imports for alias in node.names}
        assert not named & classes, f"{name_of(path)} names {named & classes}"


def test_folders_and_files_are_small():
    for folder in {path.parent for path in FILES if path.parent.name.startswith("_")}:
        files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 8, f"{name_of(folder)}: {files}"
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > 350} == {}


def test_the_facade_imports_no_optional_module():
    optional = {"mora_jax." + name for name in ("checkpoint", "export", "peft", "quantized")}
    optional |= {"orbax", "qwix", "safetensors"}
    code = f"import sys, mora_jax; assert not {optional} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_facade_names_what_it_gives():
    assert sorted(mora_jax.__all__) == mora_jax.__all__
    assert all(hasattr(mora_jax, name) for name in mora_jax.__all__)
