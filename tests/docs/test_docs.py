"""The documentation says what is so: its links lead somewhere, its code runs, its commands, fields,
files and names exist.

A Python block that cannot run here has `<!-- not run: REASON -->` on the line before it; its
syntax and what it imports of ours are checked all the same.
"""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from helpers.markdown_pages import PAGES, ROOT, Block, anchors, blocks, inline_code, links, name
from helpers.training_cases import write_model
from pydantic import ValidationError

from opsd.cli import main as cli
from opsd.cli.arguments import check_bounds
from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.config.load import parse_config, with_overrides

BLOCKS = [block for page in PAGES for block in blocks(page)]
# py and pycon: signatures and examples of docstrings, which test_generated_pages.py runs.
LANGUAGES = {"python", "py", "pycon", "sh", "yaml", "json", "text"}
MADE = "<!-- Written by `"  # by a program, that is
OURS = ("opsd", "opsd_kernels", "benchmarks", "tests")
# In the text: a path of ours, the dotted name of something in Python, a field of the config.
A_PATH = re.compile(r"(?:opsd|opsd_kernels|benchmarks|csrc|docs|examples|tests)/[\w./-]+")
A_NAME = re.compile(r"(?:opsd|opsd_kernels|benchmarks)(?:\.[A-Za-z_]\w*)+")
A_FIELD = re.compile(r"([a-z_]+)((?:\.[a-z_0-9]+)+)(?:(?:: |=)(.+))?")
COMMANDS = cli.parser()._subparsers._group_actions[0].choices


def of(*languages: str):
    found = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", found, ids=str)


def each_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=name)(test)


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """All files of the repository and their directories; what is there, where git is not."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        files = [Path(file) for file in listed.stdout.split("\0") if file]
    else:
        files = [file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file()]
    return {str(path) for file in files for path in (file, *file.parents)}


@each_page
def test_links_lead_somewhere(page, tracked):
    wrong = []
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.is_relative_to(ROOT) or str(there.relative_to(ROOT)) not in tracked:
            wrong.append(f"{name(page)}:{line}: there is no {target}")
        elif anchor and anchor not in anchors(there):
            wrong.append(f"{name(page)}:{line}: {path or 'the page'} has no heading #{anchor}")
    assert not wrong, "\n".join(wrong)


def test_the_site_shows_every_page():
    shown = (ROOT / "mkdocs.yml").read_text()
    pages = {page.name if page.parent != ROOT else page.name.lower() for page in PAGES}
    wrong = {page for page in pages - {"readme.md"} if f" {page}\n" not in shown}
    assert not wrong, f"mkdocs.yml leaves out {wrong}"


@each_page
def test_lines_are_short(page):
    if name(page) == "SECURITY.md":
        return  # a table of tests
    long = [n for n, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 120]
    assert not long or MADE in page.read_text(), f"{name(page)}: lines {long} are longer than 120"


def test_the_pages_are_short():
    words = {name(p): len(p.read_text().split()) for p in PAGES if MADE not in p.read_text()}
    assert words["README.md"] <= 700
    assert sum(n for page, n in words.items() if page.startswith("docs/")) <= 16_000, words


def test_blocks_name_their_language():
    wrong = [f"{block}: {block.language!r}" for block in BLOCKS if block.language not in LANGUAGES]
    assert not wrong, f"{wrong} must be of {LANGUAGES}"


@pytest.fixture
def names(monkeypatch, tmp_path) -> dict:
    """What the pages' Python takes for granted: 6 tokens, a vocabulary of 32, states of width 8."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 32, bias=False)
    student, teacher = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    return {
        "torch": torch,
        "student_hidden": student,
        "teacher_hidden": teacher,
        "lm_head": head,
        "W": head.weight,
        # By Liger's names.
        "student_input": student,
        "student_weight": head.weight,
        "teacher_input": teacher,
        "teacher_weight": head.weight.detach(),
        "true_labels": torch.randint(32, (6,)),
        "student_bias": None,
        "teacher_bias": None,
    }


@of("python")
def test_python_runs(block: Block, names):
    tree = ast.parse(block.text, str(block))
    if block.not_run is None:
        exec(compile(tree, str(block), "exec"), names)
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            for alias in node.names:
                resolve(f"{node.module}.{alias.name}")


@of("yaml")
def test_yaml_is_a_config(block: Block):
    values = yaml.safe_load(block.text)
    if isinstance(values, dict) and set(values) & set(Config.model_fields):
        check_config(values)


@pytest.mark.parametrize("page", ["README.md", "docs/first-ten-minutes.md"])
def test_the_first_config_of_ones_own_passes_a_dry_run(page, tmp_path, monkeypatch, capsys):
    """The page's row 60 times over, its config on a tiny model."""
    monkeypatch.chdir(tmp_path)
    page = blocks(ROOT / page)
    row, config = ([b.text for b in page if b.language == kind] for kind in ("json", "yaml"))
    rows = [row[0].replace("17", str(number)) for number in range(100, 160)]
    Path("rows.jsonl").write_text("".join(rows))
    Path("mine.yaml").write_text(config[0])
    model = write_model(tmp_path / "model") / "config.json"
    model.write_text(json.dumps({**json.loads(model.read_text()), "max_position_embeddings": 2048}))
    assert cli.main(["train", "mine.yaml", "model.path=model", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "The teacher's context" in shown and "50 held out. Nothing was trained" in shown


@of("json")
def test_json_parses(block: Block):
    json.loads(block.text)


@of("sh")
def test_commands_exist(block: Block, tracked):
    for command in commands(block.text):
        try:
            check_command(command, tracked)
        except (SystemExit, UserError) as error:
            pytest.fail(f"{block}: {' '.join(command)}: {error}")


@each_page
def test_what_the_text_names_exists(page, tracked):
    """Files, `opsd` commands and their options, config fields and values, and Python names."""
    wrong = []
    for line, code in inline_code(page):
        try:
            check_inline(code, tracked)
        except (AssertionError, UserError) as error:
            wrong.append(f"{name(page)}:{line}: `{code}`: {error}")
    assert not wrong, "\n".join(wrong)


def check_inline(code: str, tracked: set[str]) -> None:
    code = code.removesuffix("()")
    if code.startswith("opsd "):
        check_options(code.split()[1:])
    elif re.match(r"(?:python|pytest) ", code):
        check_command(code.split(), tracked)
    elif A_PATH.fullmatch(code):
        assert code.rstrip("/") in tracked, "no such file"
    elif A_NAME.fullmatch(code):
        resolve(code)
    elif (field := A_FIELD.fullmatch(code)) and field[1] in Config.model_fields:
        check_field(field[1] + field[2], field[3])


def check_options(words: list[str]) -> None:
    """The subcommand and the options of an `opsd` command that may leave its arguments out."""
    assert words[0] in COMMANDS, f"there is no command {words[0]!r}"
    known = COMMANDS[words[0]]._option_string_actions
    for word in words[1:]:
        assert not word.startswith("--") or word in known, f"there is no {word}"
        if "." in word.partition("=")[0] and "=" in word:
            check_field(*word.split("=", 1))


def check_field(field: str, value: str | None) -> None:
    """A field of the config exists, and may have this value."""
    kind = Config
    for part in field.split("."):
        fields = getattr(kind, "model_fields", {})
        assert part in fields, f"there is no field {part!r} in {getattr(kind, '__name__', kind)}"
        annotation = fields[part].annotation
        kinds = (annotation, *getattr(annotation, "__args__", ()))
        kind = next((k for k in kinds if hasattr(k, "model_fields")), annotation)
    if value is None or "…" in value:
        return
    section = field.split(".")[0]
    values = with_overrides({}, [f"{field}={value}"])[section]
    try:
        Config.model_fields[section].annotation.model_validate(values)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["type"] != "missing"]
        assert not problems, problems[0]["msg"]


def check_config(values: dict) -> None:
    """A config, or a part of one: what it leaves out and has no default is filled in."""
    values = {**values}
    values["model"] = {"path": "somewhere", **(values.get("model") or {})}
    values["data"] = {"source": "rows.jsonl", **(values.get("data") or {})}
    parse_config(values)


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block of shell."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "||", "|", ";"):
                if words:
                    found.append(words)
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)
    return found


def check_command(words: list[str], tracked: set[str]) -> None:
    """The program is ours, and takes these arguments; or somebody else's, which is let be."""
    if words[0] in ("torchrun", "accelerate"):
        words = words[words.index("--no-python") + 1 :] if "--no-python" in words else words
        words = ["python", *words[words.index("-m") :]] if "-m" in words else words
    if words[:3] == ["python", "-m", "opsd"]:
        words = words[2:]
    if words[0] == "opsd":
        check_opsd(words[1:], tracked)
    elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in OURS:
        found = importlib.util.find_spec(words[2])
        assert found, f"there is no module {words[2]}"
        if found.submodule_search_locations:
            found = importlib.util.find_spec(f"{words[2]}.__main__")
        source = Path(found.origin).read_text()
        for word in words[3:]:
            assert not word.startswith("--") or f'"{word}"' in source, f"there is no {word}"
    elif words[0] == "pytest" or words[:3] == ["python", "-m", "pytest"]:
        for word in words[1:]:
            assert not word.startswith("tests") or word in tracked, f"there is no {word}"
    elif words[0] == "python" and words[1].startswith("tests/"):
        assert words[1] in tracked, f"there is no {words[1]}"
    elif words[:2] == ["pip", "install"]:
        check_pip(words[2:], tracked)


def check_opsd(words: list[str], tracked: set[str]) -> None:
    parsed = cli._parse(words)
    check_bounds(parsed)
    for word in words:
        path = word.startswith("examples/")
        assert not path or word in tracked, f"there is no {word}"
    if words[0] == "eval":
        from opsd.cli.evaluate_arguments import check
        from opsd.evaluate.benchmarks import KNOWN

        check(parsed, {})
        assert parsed.benchmark in KNOWN or re.search("[./:]", parsed.benchmark), "no benchmark"
    if words[0] == "plan":
        from opsd.cli.plan_arguments import check

        check(parsed)
    if words[0] in ("train", "plan") and "--help" not in words:
        config = ROOT / getattr(parsed, "config", parsed.__dict__.get("model"))
        values = yaml.safe_load(config.read_text()) if config.is_file() else {}
        values = {key: value for key, value in values.items() if value is not None}
        check_config(with_overrides(values, parsed.overrides))


def check_pip(words: list[str], tracked: set[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if match := re.fullmatch(r"\.\[(.+)\]", word):
            unknown = set(match[1].split(",")) - set(extras["optional-dependencies"])
            assert not unknown, f"pyproject.toml has no extra {unknown}"
        if word.endswith(".txt"):
            assert word in tracked, f"there is no {word}"


def resolve(dotted: str):
    """The module, or what is in one, of this name."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        module = ".".join(parts[:size])
        if importlib.util.find_spec(parts[0]) and _is_module(module):
            found = importlib.import_module(module)
            for part in parts[size:]:
                assert hasattr(found, part), f"{dotted}: there is no {part} in {module}"
                found = getattr(found, part)
            return found
    raise AssertionError(f"there is no module {parts[0]}")


def _is_module(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
