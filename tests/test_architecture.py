"""The house keeps its shape: imports between rooms point one way, modules and functions stay short.

What counts as a room and as an import: helpers/rooms.py. `pytest -s` shows the table of rooms.
"""

import ast
import re
from pathlib import Path

import pytest
from helpers.rooms import ORDER, ROOT, House, Module

MOST_ROOMS = 25
MOST_ARROWS = 110
MOST_FLAT_MODULES = 6  # beside the rooms of opsd
MOST_LINES = 33_656  # of Python in opsd/
LONGEST_MODULE = 500  # lines; a longer module has two jobs
LONGEST_FUNCTION = 80  # lines without signature and docstring

# `opsd plan` says what a call of the kernels will take: by the plan that the call itself makes. Our
# sampler decodes with the kernels' attention and products.
INTERNAL = {
    "opsd.plan.memory": {"opsd_kernels.plan", "opsd_kernels.resolve", "opsd_kernels.sweep"},
    "opsd.rollout.decoding": {"opsd_kernels.attention", "opsd_kernels.packed"},
}

HOUSE = House(ROOT)
MODULES = HOUSE.modules


# ------------------------------------------------------------------------------------- the rooms


def test_imports_point_downward():
    print(f"\n{HOUSE.table()}")
    assert HOUSE.upward() == []


def test_rooms_and_arrows_are_few():
    assert len(HOUSE.rooms) <= MOST_ROOMS
    assert len(HOUSE.arrows) <= MOST_ARROWS
    assert len(HOUSE.flat_modules()) <= MOST_FLAT_MODULES
    assert HOUSE.opsd_lines() <= MOST_LINES


def test_no_module_imports_itself_through_others():
    assert HOUSE.in_cycles() == []


@pytest.mark.parametrize("room", sorted(HOUSE.rooms))
def test_a_room_says_what_it_is_for(room):
    """In two sentences or more: what it is for, and what may be imported from it."""
    package = MODULES[room if "." in room or room in MODULES else f"opsd.{room}"]
    text = ast.get_docstring(package.tree) or ""
    sentences = [part for part in " ".join(text.split()).split(". ") if part]
    if room not in ("opsd", "opsd_kernels"):
        assert len(sentences) >= 2, text


def test_contributors_read_of_every_room():
    table = re.findall(r"^\| `opsd/(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert table == [room for room in ORDER if room in HOUSE.rooms and not room.startswith("opsd")]


# ----------------------------------------------------------------------------------- the kernels


def test_training_calls_the_kernels_by_their_public_names():
    for name, module in MODULES.items():
        if not name.startswith("opsd_kernels"):
            inside = {i.module for i in module.imports if i.module.startswith("opsd_kernels.")}
            assert inside == INTERNAL.get(name, set()), name


# ----------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_has_one_job(name):
    module = MODULES[name]
    assert module.lines <= LONGEST_MODULE
    assert ast.get_docstring(module.tree), "says what it is for"
    assert [name for name, n in module.functions.items() if n > LONGEST_FUNCTION] == []


def test_every_public_name_is_documented():
    """Functions and classes that other modules may call; those of a backend's tiles have their
    contract in tiles/torch.py.
    """
    bare = []
    for name, module in MODULES.items():
        if name.startswith("opsd_kernels.tiles") or "._" in name:
            continue
        for node in module.tree.body:
            named = isinstance(node, ast.ClassDef | ast.FunctionDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{name}.{node.name}")
    assert not bare


# ------------------------------------------------------------------------------------- the tests


def files_of_tests() -> list[Path]:
    paths = (ROOT / "tests").rglob("test_*.py")
    return sorted(paths)


def in_tests(path: Path) -> Module:
    return Module(str(path.relative_to(ROOT)), path, frozenset(MODULES))


def imports_of_tests(module: Module) -> list[str]:
    """The test modules that a file imports, as 'file: module'."""
    found = []
    for node in ast.walk(module.tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            if name.rpartition(".")[2].startswith("test_"):
                found.append(f"{module.name}: {name}")
    return found


def test_no_test_imports_another():
    """What two of them need is in tests/helpers."""
    assert [line for path in files_of_tests() for line in imports_of_tests(in_tests(path))] == []


def test_tests_stand_in_the_room_that_they_test():
    rooms = {room.removeprefix("opsd_") for room in HOUSE.rooms} - {"opsd"}
    for path in files_of_tests():
        place = path.relative_to(ROOT / "tests").parts
        assert len(place) == 1 or place[0] in rooms | {
            "docs",
            "benchmarks",
            "attacks",
            "security",
        }, path


def taken_elsewhere(module: Module) -> list[str]:
    """Names that a file takes from a module of ours that only imports them itself.

    A package may offer what its modules define. So may `opsd`, what all of them define.
    """
    found, bound = [], {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (whole := f"{node.module}.{alias.name}") in MODULES:
                    bound[alias.asname or alias.name] = whole
                elif node.module in MODULES and not offers(MODULES[node.module], alias.name):
                    found.append(f"{module.name}: from {node.module} import {alias.name}")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = bound.get(node.value.id)
            if owner and not offers(MODULES[owner], node.attr) and node.attr not in REPLACED:
                found.append(f"{module.name}: {node.value.id}.{node.attr} of {owner}")
    return found


# Replaced where it is looked up, not where it is defined.
REPLACED = {"packed_attention", "Grader", "write_report"}


def offers(module: Module, name: str) -> bool:
    origin = module.origins.get(name)
    package = module.name if module.path.stem == "__init__" else "no package"
    return origin is None or origin.module.startswith(f"{package}.")


@pytest.mark.parametrize("folder", ["opsd_kernels", "tests", "benchmarks", "examples"])
def test_names_are_taken_from_where_they_are_defined(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    found = [line for path in paths for line in taken_elsewhere(in_tests(path))]
    assert found == []


def test_scripts_inside_of_tests_import_what_there_is():
    """Those in strings, for a process of their own."""
    for path in files_of_tests():
        text = "" if path == Path(__file__) else path.read_text(encoding="utf-8")
        for module, name in re.findall(r"from (opsd[\w.]*) import (\w+)", text):
            assert module in MODULES, f"{path}: {module}"
            there = f"{module}.{name}" in MODULES or re.search(rf"\b{name}\b", MODULES[module].text)
            assert there, f"{path}: from {module} import {name}"


# ------------------------------------------------------------------------ what these tests notice


def synthetic(root: Path, **sources: str) -> House:
    """A house of these modules: `common__files` is opsd/common/files.py."""
    for name, source in sources.items():
        path = root.joinpath("opsd", *name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for package in ("__init__.py", "../__init__.py"):
            (path.parent / package).touch()
    return House(root)


@pytest.mark.parametrize(
    "source",
    [
        "from opsd.cli.main import main",
        "import opsd.cli.main as command",
        "def f():\n    from opsd.cli import main",
        "import importlib\ndef f():\n    importlib.import_module('opsd.cli.main')",
        "from importlib.util import find_spec\nfind_spec('opsd.cli.main')",
        "import importlib\nimportlib.import_module(f'opsd.cli.{name}')",
        "LAZY = {'main': 'opsd.cli.main'}",
        "LAZY = {'main': 'opsd.cli.main:main'}",
    ],
)
def test_an_upward_import_is_seen_however_it_is_written(source, tmp_path):
    made = synthetic(tmp_path, common__files=source, cli__main="def main(): ...")
    assert "opsd.common.files -> opsd.cli.main" in made.upward()


def test_a_reexport_does_not_hide_an_arrow(tmp_path):
    made = synthetic(
        tmp_path,
        training__run="def train(): ...",
        config__load="from opsd.training.run import train as start",
        runs__read="from opsd.config.load import start",
    )
    assert made.upward() == [
        "opsd.config.load -> opsd.training.run",
        "opsd.runs.read -> opsd.training.run",
    ]


def test_a_cycle_within_a_room_is_seen(tmp_path):
    made = synthetic(
        tmp_path,
        data__rows="from opsd.data.sources import read",
        data__sources="def read():\n    from opsd.data import rows",
        data__prompts="import opsd.data.rows\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from opsd.cli.main import main",
        cli__main="",
    )
    assert made.in_cycles() == ["opsd.data.rows", "opsd.data.sources"]
    assert made.upward() == []


def test_a_room_without_a_place_is_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"ORDER does not say .*\['attic'\]"):
        assert synthetic(tmp_path, attic__box="").rooms


def test_a_functions_lines_are_those_of_its_body(tmp_path):
    source = 'def f(\n    a,\n):\n    """Says.\n\n    More.\n    """\n    a += 1\n\n    return a\n'
    made = synthetic(tmp_path, data__rows=source)
    assert made.modules["opsd.data.rows"].functions == {"opsd.data.rows.f": 3}
