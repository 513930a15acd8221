"""The notebooks run from top to bottom, and the pages' scripts, with a tiny model for the hub's."""

import json
import re

import pytest
from helpers.markdown_pages import ROOT, blocks
from helpers.training_cases import write_model

NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
HUB = r'"(?:HuggingFaceTB|Qwen)/[\w.-]+"'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With positions for contexts of the default templates, a token a character."""
    place = write_model(tmp_path_factory.mktemp("tiny") / "model")
    config = place / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"max_position_embeddings": 4096}))
    return place


def shortened(code: str, model, *sizes: tuple[str, str]) -> str:
    """The code with the tiny model, and with these words for others; each must be there."""
    code, models = re.subn(HUB, repr(str(model)), code)
    assert models == 1
    for old, new in sizes:
        assert old in code, old
        code = code.replace(old, new)
    return code


def cells(path) -> list[str]:
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4 and notebook["cells"][0]["cell_type"] == "markdown"
    assert not any(cell.get("outputs") for cell in notebook["cells"])  # it is kept without
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


def test_the_first_notebook(model, here, capsys):
    (path,) = [path for path in NOTEBOOKS if path.name == "first_run.ipynb"]
    sizes = (
        (", 14, 20, 800", ", 2, 2, 40"),
        ("=48", "=6"),
        ("16", "4"),
        ("64:", "2:"),
        ("64]", "2]"),
    )
    code = shortened("\n\n".join(cells(path)), model, *sizes)
    names: dict = {}
    exec(compile(code, str(path), "exec"), names)
    shown = capsys.readouterr().out
    assert re.search(r"step 0, teacher: .*\n(step \d, student: .* to .*\n){2}", shown)
    assert shown.count("→") == 3
    assert names["trainer"].state.global_step == 2 and (here / "runs/first/model").is_dir()


def test_the_loop_of_ones_own(model, here, capsys):
    (path,) = [path for path in NOTEBOOKS if path.name == "plain_loop.ipynb"]
    code = shortened("\n\n".join(cells(path)), model, (", 5, 64", ", 3, 8"))
    names: dict = {}
    exec(compile(code, str(path), "exec"), names)
    assert len(names["losses"]) == 3 and all(loss > 0 for loss in names["losses"])
    assert names["fused"].item() == pytest.approx(names["dense"].item(), rel=1e-4)


@pytest.mark.parametrize(
    "page, sizes",
    [
        ("python", [("range(100)", "range(24)"), ("[:80]", "[:20]"), ("[80:]", "[20:]")]),
        ("from-trl", [("range(100)", "range(6)"), ("steps=100", "steps=1"), ("=512", "=6")]),
    ],
)
def test_the_pages_scripts(page, sizes, model, here):
    code = "\n\n".join(
        block.text for block in blocks(ROOT / f"docs/{page}.md") if block.language == "python"
    )
    code = re.sub(r"\bsteps=50\b", "steps=1, rollout_max_new_tokens=6", code)
    code = re.sub(r"\bproblems_per_step=\d+", "problems_per_step=2", code)
    code = re.sub(r"\bgroup_size=\d", "group_size=2", code)
    code = shortened(code, model, *sizes)
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    assert names["trainer"].state.global_step == 1
    assert (here / "runs/mine/report.html").is_file()
    if page == "python":
        assert (here / "mine/config.json").is_file() and (here / "runs/grpo/model").is_dir()
