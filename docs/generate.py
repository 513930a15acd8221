"""Writes the reference pages from the code: `python docs/generate.py`.

docs/options.md is made of the config classes (`opsd/config/`), docs/api.md of
signatures and docstrings, docs/agreement.md of the grader's judged pairs, docs/models.md of
docs/models.jsonl, docs/gpu-cost.md of the kernels' model, docs/kernel-cpu.svg of a benchmark's
results, opsd/config/schema.json of the config classes again, for editors. A test compares them with
what this would write now.
"""

import importlib
import inspect
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from figure import kernel_figure
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

import opsd
from opsd.config.base import Section
from opsd.config.config import Config

DOCS = Path(__file__).parent
MADE = "<!-- Written by `python docs/generate.py`: change the code, not this page. -->\n\n"

OPTIONS = """# Options

Every field of a config file. What a run used, defaults filled in, is in its `config.yaml`. On the
command line a field is `section.field=value`, with the value in YAML:

```sh
opsd train examples/smollm2.yaml train.learning_rate=5e-5 'model.lora={rank: 16}'
```

`opsd train --help` prints the same list. A key that is not here is an error that suggests the
nearest; so is an option that the method has no use for. What the methods do with them:
[methods.md](methods.md).

"""

API = """# Python interface

What a training script needs comes `from opsd import …`: `examples/minimal_loop.py` is a whole run
written with it. The losses alone are in `opsd_kernels`.

Shapes are in brackets: N tokens, V vocabulary entries, D hidden width; `[...]` is any leading
shape. Divergences, log-probabilities and entropies are in nats. The tests run the examples.

"""

AGREEMENT = """# Appendix: the grader's agreement with judged pairs

The pairs of `tests/data/answer_pairs.jsonl` by kind, and how many of them must earn nothing. Here
is [how the grader reads answers](evaluate.md#grading), and how often it agrees.

| kind | pairs | must earn nothing |
| --- | --- | --- |
"""

MODELS = """# Appendix: model types

Every type of transformers' `AutoModelForCausalLM`, tried as a tiny random model by
`python -m tests.helpers.families`: two steps each of OPSD, of GRPO, without sharing and with
adapters; a plan; an evaluation. transformers then loads what was saved. Types with images are
loaded whole; their text decoder trains. [What sharing is](prefix.md).

| outcome | types | |
| --- | --- | --- |
"""

OUTCOMES = {
    "shared": "each prefix runs once, exactly: logits within 2e-5, gradients within 1e-5",
    "continued": "the same, by the prefix's cache",
    "teacher shared": "the teacher's prefix runs once, the student's with each rollout",
    "not shared": "trains, each rollout with its own prefix",
    "refused": "one line before any work",
    "fails": "a mistake here",
}
"""What becomes of a type."""

GPU_COST = """# Appendix: what the kernels should cost on a GPU

Computed, not measured: [the model](../benchmarks/gpu/model.py) and what it is for are
[described here](gpu.md#what-they-should-cost-a-model).

"""

PUBLIC = {
    "opsd_kernels": (
        "linear_divergence",
        "LinearDivergence",
        "Divergence",
        "Clip",
        "LogitTransform",
        "linear_log_prob",
        "LinearLogProb",
        "backends",
    ),
    "opsd_kernels.adapters": ("divergence_of",),
    "opsd_kernels.adapters.liger": ("FusedLinearJSDLoss",),
    "opsd": tuple(name for name in opsd.__all__ if name not in opsd.HOMES["opsd_kernels"]),
    "opsd.config.load": ("save_config",),
    "opsd.data.boxed": ("last_boxed",),
}


def options_page() -> str:
    """docs/options.md."""
    top = [(name, field) for name, field in Config.model_fields.items() if not inner(field)]
    parts = [MADE, OPTIONS, "## method\n\n", *table("", top)]
    for name, field in Config.model_fields.items():
        if inner(field):
            parts += section(name, inner(field), level=2)
    return "".join(parts)


def section(name: str, model: type[Section], level: int) -> Iterator[str]:
    """A section's heading, what it is, its fields, and the sections within it."""
    yield f"{'#' * level} {name}\n\n{inspect.getdoc(model)}\n\n"
    yield from table(f"{name}.", list(model.model_fields.items()))
    for field_name, field in model.model_fields.items():
        if inner(field):
            yield from section(f"{name}.{field_name}", inner(field), level + 1)


def table(prefix: str, fields: list[tuple[str, FieldInfo]]) -> Iterator[str]:
    """The fields as a table, then the defaults that are too long for it."""
    yield "| field | values | default | |\n| --- | --- | --- | --- |\n"
    long = []
    for name, field in fields:
        default = default_of(field)
        if len(default) > 40:
            long.append((prefix + name, field.default))
            default = "below"
        cells = (f"`{prefix}{name}`", values(field), default, linked(field.description))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    yield "\n"
    for name, text in long:
        yield f"`{name}` is by default\n\n```text\n{text}\n```\n\n"


def inner(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or may hold; None if it holds values."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)


def default_of(field: FieldInfo) -> str:
    """As it is written in YAML."""
    if field.is_required():
        return "*required*"
    value = field.get_default()
    if isinstance(value, Section):
        return "its own"
    words = {None: "null", True: "true", False: "false", "": '""'}
    plain = isinstance(value, (str, bool, type(None)))
    text = words.get(value, value) if plain else value
    return f"`{str(text).replace(chr(39), '')}`"


def values(field: FieldInfo) -> str:
    """What the field may be, in words."""
    text, bounds = kind(field.annotation), bounds_of(field)
    if text.startswith("list") and bounds:
        bounds = ["(length " + " ".join(bounds) + ")"]
    head, *rest = text.split(" or ")
    return " or ".join([" ".join([head, ", ".join(bounds)]).strip(), *rest])


def bounds_of(field: FieldInfo) -> list[str]:
    """Its limits, in signs."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = []
    for item in field.metadata:
        bounds += [f"{sign} {getattr(item, n)}" for n, sign in signs.items() if hasattr(item, n)]
        bounds += [f"from {item.min_length}"] if hasattr(item, "min_length") else []
        bounds += [f"to {item.max_length}"] if hasattr(item, "max_length") else []
    return bounds


def kind(annotation: Any) -> str:
    """A type in words."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        if isinstance(arguments[1], BeforeValidator):
            return kind(arguments[1].json_schema_input_type)
        return f"{kind(arguments[0])} {', '.join(bounds_of(arguments[1]))}"
    if get_origin(annotation) is Literal:
        words = {True: "true", False: "false"}
        return ", ".join(f"`{words.get(a, a) if isinstance(a, bool) else a}`" for a in arguments)
    if type(None) in arguments:
        rest = [kind(a) for a in arguments if a is not type(None)]
        return " or ".join([*rest, "`null`"])
    if get_origin(annotation) is UnionType:
        return " or ".join(map(kind, arguments))
    if get_origin(annotation) is list:
        return f"list of {kind(arguments[0])}"
    if get_origin(annotation) is dict:
        return f"mapping to {kind(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section, below"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Any: "anything"}
    return names[annotation]


def linked(text: str) -> str:
    """A text with the pages that it names as links, and nothing in it read as HTML."""
    outside = re.split(r"(`[^`]*`)", text)
    outside[::2] = [part.replace("<", "&lt;") for part in outside[::2]]
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", "".join(outside))


def api_page() -> str:
    """docs/api.md."""
    parts = [MADE, API]
    for module_name, names in PUBLIC.items():
        module = importlib.import_module(module_name)
        parts.append(f"## {module_name}\n\n")
        for name in names:
            thing = getattr(module, name)
            parts += [f"### {name}\n\n", call(name, thing), prose(inspect.getdoc(thing)), "\n"]
            parts += methods(thing) if inspect.isclass(thing) else []
    return "".join(parts).rstrip("\n") + "\n"


def methods(thing: type) -> Iterator[str]:
    """The public methods that a class, or one of ours that it extends, defines and describes."""
    ours = [vars(c) for c in reversed(thing.__mro__) if c.__module__.startswith("opsd")]
    for name, method in {name: one for c in ours for name, one in c.items()}.items():
        if inspect.isfunction(method) and not name.startswith("_") and method.__doc__:
            yield f"#### {thing.__name__}.{name}\n\n"
            yield call(name, method) + prose(inspect.getdoc(method)) + "\n"


def call(name: str, thing: Any) -> str:
    """The signature, as code; nothing for a class that is called without arguments."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return ""
    signature = inspect.signature(thing)
    own = [p for n, p in signature.parameters.items() if n != "self"]
    returned = "" if inspect.isclass(thing) else f" -> {annotation(signature.return_annotation)}"
    line = f"{name}({', '.join(map(parameter, starred(own)))}){returned}"
    if len(line) > 88:
        inside = "".join(f"    {parameter(p)},\n" for p in starred(own))
        line = f"{name}(\n{inside}){returned}"
    return f"```py\n{line}\n```\n\n"


def starred(parameters: list[inspect.Parameter]) -> list[inspect.Parameter | str]:
    """The parameters with a `*` before the first that has to be named."""
    found: list[inspect.Parameter | str] = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        found.append(p)
    return found


def parameter(p: inspect.Parameter | str) -> str:
    if isinstance(p, str):
        return p
    its_own = f"{type(p.default).__name__}()" if isinstance(p.default, Section) else repr(p.default)
    default = "" if p.default is p.empty else f" = {its_own}"
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    return f"{stars}{p.name}: {annotation(p.annotation)}{default}"


def annotation(kind: Any) -> str:
    text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text)


ITEM = re.compile(r"  |- |([a-z_]+(?:, [a-z_]+)*(?: \[[^]]*\])?): ")


def prose(text: str) -> str:
    """A docstring as Markdown: paragraphs, `name: what it is` as lists, examples as code."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        if lines[0] in ("Args:", "Attributes:"):
            lines = textwrap.dedent("\n".join(lines[1:])).split("\n")
        if lines[0].lstrip().startswith(">>>"):
            parts.append(f"```pycon\n{textwrap.dedent(paragraph)}\n```")
        elif all(line.startswith("    ") for line in lines):
            parts.append(f"```text\n{textwrap.dedent(paragraph)}\n```")
        elif all(ITEM.match(line) for line in lines):
            parts.append(items(lines))
        else:
            parts.append(linked(" ".join(line.strip() for line in lines)))
    return "\n\n".join(parts) + "\n"


def items(lines: list[str]) -> str:
    """`name: what it is` lines, their continuations indented, as a list."""
    found: list[str] = []
    for line in lines:
        if line.startswith(" ") and found:
            found[-1] += " " + line.strip()
        else:
            found.append(
                "- " + re.sub(ITEM, lambda m: f"`{m[1]}`: " if m[1] else "", line, count=1)
            )
    return linked("\n".join(found))


def gpu_cost_page() -> str:
    """docs/gpu-cost.md: the tables of `benchmarks.gpu.model`."""
    sys.path.append(str(DOCS.parent))
    from benchmarks.gpu import model

    return f"{MADE}{GPU_COST}{model.tables()}"


def agreement_page() -> str:
    """docs/agreement.md: the kinds of the grader's judged pairs."""
    lines = (DOCS.parent / "tests" / "data" / "answer_pairs.jsonl").read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    kinds = Counter(pair["kind"] for pair in pairs)
    wrong = Counter(pair["kind"] for pair in pairs if not pair["correct"])
    rows = [f"| {kind} | {count} | {wrong[kind]} |\n" for kind, count in sorted(kinds.items())]
    return "".join([MADE, AGREEMENT, *rows])


def models_page() -> str:
    """docs/models.md: the types of docs/models.jsonl by outcome."""
    lines = [json.loads(line) for line in (DOCS / "models.jsonl").read_text().splitlines()]
    found = [(line["type"], *outcome(line)) for line in lines]
    counts = Counter(result for _, result, _ in found)
    parts = [MADE, MODELS]
    parts += [f"| {name} | {counts[name]} | {text} |\n" for name, text in OUTCOMES.items()]
    parts.append(f"\nWith transformers {lines[0]['transformers']}:\n\n")
    parts.append("| type | outcome | why, and what else does not go |\n| --- | --- | --- |\n")
    for name, result, why in found:
        parts.append(f"| {name} | {result} | {linked(why).replace('|', chr(92) + '|')} |\n")
    return "".join(parts)


def outcome(line: dict[str, Any]) -> tuple[str, str]:
    """A type's outcome, one of OUTCOMES, and why, with what of its commands ended otherwise."""
    ends = {name: said_plainly(end) for name, end in line["commands"].items()}
    wrong = [f"{name}: {end}" for name, end in ends.items() if end]
    if "error" in line or any("internal error" in end or end == "exit 1" for end in wrong):
        return "fails", "; ".join([line.get("error", ""), *wrong]).strip("; ")
    if ends["opsd"]:
        return "refused", ends["opsd"]
    whys = [line["unshared"], *wrong]
    packed = line["unshared"] is None
    if packed or line.get("student_uncontinued", packed) is None:
        exact = line["logits"] <= 2e-5 and line["gradients"] <= 1e-5
        named = "shared" if packed else "continued"
        return named if exact else "fails", "; ".join(filter(None, whys))
    if line["uncontinued"] is None:
        return "teacher shared", "; ".join(whys)
    return "not shared", "; ".join([line["unshared"], line["uncontinued"], *wrong])


def said_plainly(end: str) -> str:
    """A command's error without the field that it starts with, and without a list at its end."""
    text = re.sub(r"^opsd: (model\.path( is 'model')?: )?", "", end)
    return re.sub(r" Model type should be one of .*|; (take|a short run|try|please) .*", "", text)


def schema() -> str:
    """The JSON schema of a config, for editors."""
    made = Config.model_json_schema()
    made["properties"]["then"] = {"type": "object", "description": "The next run's changes."}
    return json.dumps({"title": "opsd", **made}, indent=1) + "\n"


PAGES = {
    "options.md": options_page,
    "api.md": api_page,
    "agreement.md": agreement_page,
    "gpu-cost.md": gpu_cost_page,
    "models.md": models_page,
    "kernel-cpu.svg": kernel_figure,
    "../opsd/config/schema.json": schema,
}


if __name__ == "__main__":
    for page, make in PAGES.items():
        (DOCS / page).write_text(make())
