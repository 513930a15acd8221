"""Explain what is wrong with a config: the field, its value, and how to fix it.

For names and values of TRL, axolotl, verl and others it says what they are called here
(`elsewhere.toml`, `values.toml`).
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from opsd.common.errors import problem_said
from opsd.common.files import read_toml
from opsd.common.near import did_you_mean, nearest
from opsd.config.base import Section
from opsd.config.yaml import load_yaml

SHOWN_PROBLEMS = 10  # at most this many errors of one config are shown
ELSEWHERE: dict[str, str] = read_toml(__file__, "elsewhere")
"""Names that other trainers use for a field, and its former names here → its name."""

NOWHERE: dict[str, str] = {
    name: said for said, names in read_toml(__file__, "nowhere").items() for name in names
}
"""Names that other trainers use, and we have no field for → what to do instead."""

VALUES: dict[str, dict[str, str]] = read_toml(__file__, "values")
"""Field → {another trainer's name of a value: our name}."""

NUMBERS = {"int_parsing": r"[-+]?\d+", "float_parsing": r"[-+]?\d*\.?\d+([eE][-+]?\d+)?"}

TRUTH = {"yes": "true", "on": "true", "no": "false", "off": "false"}

UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "kb": 10**3, "mb": 10**6, "gb": 10**9}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


def explain_all(error: ValidationError, model: type[Section]) -> str:
    """Explain pydantic's errors, the first SHOWN_PROBLEMS of them, separated by semicolons."""
    problems = error.errors()
    said = [explain(problem, model) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        said.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    return "; ".join(dict.fromkeys(said))


def explain(problem: Any, model: type[Section]) -> str:
    """Explain one pydantic error of `model`: the field, the value, what is allowed."""
    location, kind = [str(part) for part in problem["loc"]], problem["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(location, problem["input"], model)
    if kind == "missing":
        example = {"model": "model.path=Qwen/Qwen3-1.7B", "data": "data.source=rows.jsonl"}
        example |= {"model.path": example["model"], "data.source": example["data"]}
        name = ".".join(location)
        given = example.get(name) if "rollout" in model.model_fields else None
        return f"{name} is missing" + (f": say {given}" if given else "")
    return problem_said(problem) + _meant(".".join(location), problem, model)


def places(name: str, model: type[Section]) -> list[str]:
    """The full names of the least nested fields called `name`: ["train.steps"]."""
    found = [field for field in fields_of(model) if field.rpartition(".")[2] == name]
    least = min((field.count(".") for field in found), default=0)
    return [field for field in found if field.count(".") == least]


def here(name: str, model: type[Section]) -> str:
    """Our full name for a field called `name` elsewhere or in another section; "" if unknown."""
    leaf = re.sub(r"\W+", "_", name.rpartition(".")[2])
    return ELSEWHERE.get(name) or ELSEWHERE.get(leaf) or " or ".join(places(leaf, model))


def typed(found: str, value: Any, model: type[Section]) -> str:
    """What to type for `found`, as `here` returns it: rollout.engine=vllm for "rollout.engine,
    'vllm'". It has the value where the field takes it and no note says that it means another."""
    field, _, note = found.partition(", ")
    if note.startswith("a section: "):
        return note.rpartition(" ")[2]
    if more := re.fullmatch(r"with ([\w.]+=\w+)", note):  # two assignments
        return f"{_assigned(field, value, model)} {more[1]}"
    if quoted := re.fullmatch(r"'(\w+)'", note):
        return f"{field}={quoted[1]}"
    if note or not (every := field.split(" or ")) or {*every} - {*fields_of(model)}:
        return f"{field} ({note})" if note else found
    return " or ".join(_assigned(one, value, model) for one in every)


def _assigned(field: str, value: Any, model: Any) -> str:
    *above, last = field.split(".")
    for part in above:
        model = section_of(model.model_fields[part].annotation)
    kind = model.model_fields[last]
    said = VALUES.get(field, {}).get(re.sub(r"[\s-]+", "_", str(value).lower()), value)
    if isinstance(said, str) and said != value and " " in said:
        return f"{field} ({said.removesuffix('?')})"
    text = said if isinstance(said, str) else json.dumps(said)
    try:
        form: Any = Annotated[kind.annotation, kind]
        TypeAdapter(form).validate_python(load_yaml(text))
    except (ValidationError, YAMLError):
        known = [str(one) for one in get_args(kind.annotation) if isinstance(one, str)]
        return f"{field} ({', '.join(known)})" if known else field
    return f"{field}={text}"


def _unknown(location: list[str], value: Any, model: type[Section]) -> str:
    known = _known(location[:-1], model)
    key, colon, rest = location[-1].partition(":")
    if colon and (key in known or key in ELSEWHERE):
        return f"unknown key {location[-1]!r}: YAML needs a space after the colon: `{key}: {rest}`"
    near = nearest(location[-1], known, cutoff=0.8)
    if "rollout" in model.model_fields:
        full = list(location)
        while isinstance(value, dict) and value:  # such as verl's actor.optim.lr
            key, value = next(iter(value.items()))
            full.append(str(key))
        name, foreign = ".".join(full), {full[-1], ".".join(full)}
        if said := NOWHERE.get(location[-1]) or NOWHERE.get(full[-1]):
            said = said.replace("-node N", f"-node {value}") if isinstance(value, int) else said
            return f"unknown key {name!r}: {said}"
        if (not near or foreign & ELSEWHERE.keys()) and (found := here(name, model)):
            return f"unknown key {name!r}: here it is {typed(found, value, model)}"
    elif (found := ELSEWHERE.get(location[-1], "")) in known:  # a study's
        return f"unknown key {location[-1]!r}: here it is {found}"
    near = near or nearest(location[-1], known)
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
    where = f"in section {'.'.join(location[:-1])!r}" if len(location) > 1 else "at the top"
    return f"unknown key {location[-1]!r} {where}; {hint}"


def _meant(name: str, problem: Any, model: type[Section]) -> str:
    """Suggest what a wrong value of the field `name` may mean, as the end of a sentence."""
    kind, value = problem["type"], problem["input"]
    if kind in ("model_type", "model_attributes_type"):
        inside = next((field for field in fields_of(model) if field.startswith(f"{name}.")), None)
        key, colon, rest = str(value).partition(":")
        if colon and f"{name}.{key}" in fields_of(model):
            return f"; YAML needs a space after the colon: `{key}: {rest}`"
        shown = "…" if isinstance(value, bool) or len(str(value)) >= 50 else value
        return f"; it is a section, as in {inside}={shown}" if inside else ""
    if kind == "dict_type" and name.endswith("columns"):
        return f"; write {name}={{problem: question}}, our column and theirs"
    if value is None and ":" in name:
        return (
            f"; YAML needs a space after the colon: `{name.rpartition('.')[2].replace(':', ': ')}`"
        )
    if not isinstance(value, str):
        said = VALUES.get(name, {}).get("number") if isinstance(value, int | float) else None
        return f"; {said}" if said else ""
    word = re.sub(r"[\s-]+", "_", value.lower())
    if other := VALUES.get(re.sub(r"\.\d+$", "", name), {}).get(word):
        return f"; {other}" if " " in other else f"; did you mean {other!r}?"
    if kind == "literal_error":
        if word in TRUTH and "True" in problem["ctx"]["expected"]:
            return f"; write {TRUTH[word]}"
        return did_you_mean(value, re.findall(r"'([^']+)'", problem["ctx"]["expected"]))
    plain = re.sub(r"(?<=\d)[,_](?=\d{3})", "", value).strip(" ,;'\"")
    plain = re.sub(r"^(\d+),(\d+)$", r"\1.\2", plain)  # a decimal comma
    if (form := NUMBERS.get(kind)) and plain != value and re.fullmatch(form, plain):
        return f"; write {plain}"
    number = re.fullmatch(r"([\d.]+)\s*([kmg]i?b?|%)", value.strip(), re.IGNORECASE)
    if number and kind in NUMBERS:
        unit = number[2].lower()
        if unit == "%":
            return (
                ""
                if kind == "int_parsing"
                else f"; a share is written as {float(number[1]) / 100:g}"
            )
        if name == "rollout.gpu_memory":
            return "; it is a share of the GPU's memory, such as 0.4"
        return f"; write {int(float(number[1]) * UNITS[unit])}, without a unit"
    return ""


def fields_of(model: type[Section], prefix: str = "") -> Iterator[str]:
    """The full names of all fields, such as train.steps."""
    for name, field in model.model_fields.items():
        inside = section_of(field.annotation)
        if inside and not str(field.annotation).startswith("str"):  # data.source: also a string
            yield from fields_of(inside, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def section_of(annotation: Any) -> type[Section] | None:
    """The section class that a field of this type may hold; None if it holds plain values."""
    kinds = getattr(annotation, "__args__", None) or (annotation,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)


def _known(location: Sequence[str], model: Any) -> list[str]:
    for part in location:
        field = None if part.isdigit() else model.model_fields.get(part)
        model = section_of(field.annotation) if field and section_of(field.annotation) else model
    return list(model.model_fields)
