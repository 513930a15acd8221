"""`from opsd import …`: each name is there, and nothing is imported before it is asked for."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import opsd

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", opsd.__all__)
def test_each_public_name_is_there(name):
    assert getattr(opsd, name) is getattr(opsd, name) and name in dir(opsd)


def test_editors_see_the_same_names():
    tree = ast.parse((ROOT / "opsd" / "__init__.py").read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {each.module: tuple(a.asname or a.name for a in each.names) for each in checked.body}
    assert seen == opsd.HOMES
    assert sorted(opsd.__all__) == sorted(name for names in seen.values() for name in names)


def test_importing_the_package_imports_nothing_else():
    code = "import sys, opsd; print([m for m in sys.modules if m.startswith(('opsd', 'torch'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['opsd']"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'opsd' has no attribute 'trian'"):
        _ = opsd.trian


@pytest.mark.parametrize("name", ["GRPOTrainer", "OpsdTrainer", "SFTConfig"])
def test_another_librarys_trainer_is_told_ours(name):
    with pytest.raises(ImportError, match=f"'{name}'.*OPSDConfig.method='grpo'"):
        exec(f"from opsd import {name}")


def test_the_version_is_the_distributions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert opsd.__version__ == project["version"]
