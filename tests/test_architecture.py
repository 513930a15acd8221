"""Imports point one way: nothing runs but Python's parser.

A module's imports are those of its body and of its functions; those for type checkers do not count.
"""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 500  # lines; a longer module has two jobs
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("opsd", "opsd_kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
}
# `opsd plan` says what a call of the kernels will take: by the plan that the call itself makes.
INTERNAL = {"opsd.plan.memory": {"opsd_kernels.resolve", "opsd_kernels.sweep"}}


def imports(node: ast.AST, functions: bool) -> Iterator[str]:
    """Dotted names of what is imported below `node`: modules, and names in them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not functions:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "a relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child, functions)


@cache
def imported(module: str, functions: bool = True) -> set[str]:
    """Of our modules, those that `module` imports."""
    tree = ast.parse(FILES[module].read_text())
    names = imports(tree, functions)
    found = {name if name in FILES else name.rpartition(".")[0] for name in names}
    return {name for name in found if name in FILES}


def test_the_kernels_know_nothing_of_training():
    for module in FILES:
        if module.startswith("opsd_kernels"):
            assert {m for m in imported(module) if m.split(".")[0] == "opsd"} == set(), module


def test_training_calls_the_kernels_by_their_public_names():
    for module in FILES:
        if module.split(".")[0] == "opsd":
            inside = {name for name in imported(module) if name.startswith("opsd_kernels.")}
            assert inside == INTERNAL.get(module, set()), module


def test_nothing_imports_the_adapters_but_themselves():
    for module in FILES:
        if not module.startswith("opsd_kernels.adapters"):
            assert not any(m.startswith("opsd_kernels.adapters") for m in imported(module)), module


def test_no_two_modules_import_each_other():
    """A package's `__init__` counts: whoever imports one of its modules has run it."""
    graph = {module: imported(module, functions=False) - {module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_a_cycle_would_be_seen():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    assert "opsd.training.trainer" in imported("opsd.training.run")
    tree = ast.parse("import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d import e")
    assert [*imports(tree, True)] == ["a.b", "d.e"] and [*imports(tree, False)] == ["a.b"]


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_has_one_job(module):
    text = FILES[module].read_text()
    assert text.count("\n") <= LONGEST
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "says what it is for"


def test_every_public_name_is_documented():
    """Functions and classes that other modules may call; those of a backend's tiles have their
    contract in tiles/torch.py.
    """
    bare = []
    for module, path in FILES.items():
        if module.startswith("opsd_kernels.tiles") or "._" in module:
            continue
        for node in ast.parse(path.read_text()).body:
            named = isinstance(node, ast.ClassDef | ast.FunctionDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{module}.{node.name}")
    assert not bare
