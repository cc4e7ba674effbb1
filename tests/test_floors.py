"""Rooms import downwards only and hold no import cycle; importing is cheap, and any room can come first."""

import ast
import graphlib
import sys

import pytest
from conftest import ROOT, python

import stitched_llama

PACKAGE = ROOT / "stitched_llama"
FLOORS = {
    "space": 1, "layers": 1, "sampling": 2, "anchors": 2, "pst": 2, "bundles": 2, "models": 3, "training": 4, "shrinking": 5,
    "recipes": 6, "cli": 7,
}  # fmt: skip
SAME_FLOOR = {("pst", "anchors")}
# Imports for type checking alone that close a cycle, by module
FOR_TYPES_ONLY = {
    ("stitched_llama.models.calibration", "stitched_llama.models.modeling_base"),
    ("stitched_llama.models.alignment", "stitched_llama.models.modeling_base"),
}
ROOMS = [pytest.param(room, id=room) for room in FLOORS]


def imports(path):
    """(absolute module name, line, whether it stands at module level) of every import in a file."""
    package = ["stitched_llama", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node.lineno, id(node) in top
            if module == "stitched_llama":
                yield from ((f"stitched_llama.{alias.name}", node.lineno, id(node) in top) for alias in node.names)


def test_docstring_lists_every_room_with_its_floor():
    found = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    lines = [line.split() for line in ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())).splitlines()]
    told = {words[0]: int(words[1]) for words in lines if len(words) > 2 and words[1].isdecimal()}
    assert told == FLOORS
    assert found == set(FLOORS)


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_lower_rooms(room):
    seen = 0
    for path in (PACKAGE / room).rglob("*.py"):
        for module, line, _ in imports(path):
            if not module.startswith("stitched_llama."):
                continue
            target = module.split(".")[1]
            target = stitched_llama._HOMES.get(target, target)  # a public name, as users import it
            if target == "__version__":
                continue
            seen += 1
            allowed = target == room or FLOORS.get(target, 9) < FLOORS[room] or (room, target) in SAME_FLOOR
            assert allowed, f"{path.relative_to(ROOT)}:{line}: {room} ({FLOORS[room]}) imports {module}"
    assert seen, "no import of this package found: is the reader of imports broken?"


def imported_modules():
    """{module: modules of this package it imports}, in functions and for type checking too."""
    paths = {
        ".".join(["stitched_llama", *p.relative_to(PACKAGE).with_suffix("").parts]): p for p in PACKAGE.rglob("*.py")
    }
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                targets = [f"{base}.{alias.name}" for alias in node.names]
                targets = [target if target in paths else base for target in targets]
            else:
                continue
            found[name].update(target for target in targets if target in paths)
    return found


def test_no_import_cycle_between_modules():
    """Whichever kind of import closes it; the exceptions above are checked to be for types only."""
    modules = imported_modules()
    for name, target in FOR_TYPES_ONLY:
        source = (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").read_text()
        branches = [
            n for n in ast.parse(source).body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
        ]
        assert any(
            f"import {target.split('.')[-1]}" in ast.unparse(n) or f".{target.split('.')[-1]} import" in ast.unparse(n)
            for n in branches
        )
        modules[name].discard(target)
    assert sum(map(len, modules.values())) > 200, "few imports found: is the reader of imports broken?"
    graphlib.TopologicalSorter(modules).prepare()  # raises CycleError and names the modules


@pytest.mark.parametrize("room", ["space", "sampling"])
def test_room_of_the_standard_library_only(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for module, line, at_top in imports(path):
            name = module.split(".")[0]
            lazy_hub = name == "huggingface_hub" and not at_top
            assert name in sys.stdlib_module_names or name == "stitched_llama" or lazy_hub, f"{path}:{line}: {module}"


def test_layers_import_torch_only():
    for path in (PACKAGE / "layers").rglob("*.py"):
        names = {module.split(".")[0] for module, *_ in imports(path)}
        assert names <= set(sys.stdlib_module_names) | {"torch", "stitched_llama"}, path


@pytest.mark.parametrize(
    "module", ["stitched_llama", "stitched_llama.space", "stitched_llama.sampling", "stitched_llama.cli"]
)
def test_import_is_cheap(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub') if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("room", ["anchors", "pst", "training"])
def test_any_room_can_be_the_first_import(room):
    done = python(
        "-c",
        f"import stitched_llama.{room}; from transformers import AutoModelForCausalLM; from stitched_llama import PSTConfig; "
        "print(PSTConfig.__name__)",
    )
    assert done.stdout.split() == ["PSTConfig"]


def test_every_public_name_resolves():
    assert all(getattr(stitched_llama, name) is not None for name in stitched_llama.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = stitched_llama.no_such_name
