"""The reference is the code: its pages are what `docs/generate.py` writes now, and the examples in
docstrings run.
"""

import doctest
import importlib

import pytest
from helpers.markdown_pages import ROOT

PACKAGES = ("opsd", "opsd_kernels")
EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_run(module, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


@pytest.fixture(scope="module")
def pages():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        return importlib.import_module("generate").PAGES


MADE = [
    "options.md",
    "api.md",
    "agreement.md",
    "gpu-cost.md",
    "kernel-cpu.svg",
    "../opsd/config/schema.json",
]


@pytest.mark.parametrize("page", MADE)
def test_a_page_says_what_the_code_says(page, pages):
    now = (ROOT / "docs" / page).read_text()
    assert now == pages[page](), "run `python docs/generate.py`"


def test_every_public_name_of_the_kernels_is_on_the_page(pages):
    import opsd_kernels

    text = pages["api.md"]()
    names = [name for name in opsd_kernels.__all__ if name != "__version__"]
    assert all(f"### {name}\n" in text for name in names)
