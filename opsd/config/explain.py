"""Explain what is wrong with a config: the field, its value, and how to fix it."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from opsd.common.errors import problem_said
from opsd.common.near import did_you_mean, nearest
from opsd.config.base import Section
from opsd.config.foreign import VALUES, WORDS, answer, fields_of, here, section_of, typed

SHOWN_PROBLEMS = 10  # at most this many errors of one config are shown
NUMBERS = {"int": r"[-+]?\d+", "float": r"[-+]?\d*\.?\d+([eE][-+]?\d+)?"}
TRUTH, UNITS = WORDS["truth"], WORDS["units"]
COUNTED = r"s|sec(ond)?s?|(step|token|problem|row|sample|example|rollout|nat)s?"
SINGLE = {"str": "string_", "float": "float_", "int": "int_"}  # members of unions → their errors
ONE = "; one value at a time: `opsd compare` runs several configs, or seeds"


def explain_all(error: ValidationError, model: type[Section]) -> str:
    """Explain pydantic's errors, the first SHOWN_PROBLEMS of them, separated by semicolons."""
    problems = [*filter(None, map(_placed, error.errors()))]
    said = [explain(problem, model) for problem in problems[:SHOWN_PROBLEMS]]
    said += [f"and {len(problems) - SHOWN_PROBLEMS} more"] * (len(problems) > SHOWN_PROBLEMS)
    mends = {one: re.search(r" is missing: say (\S+)=", one) for one in said}
    return "; ".join(s for s, own in mends.items() if not own or f" is {own[1]}" not in str(said))


def _placed(problem: Any) -> Any:
    """The problem without what pydantic calls the members of a union in its place, such as
    data.source.list[SourceSection].0; None if a list was tried as a single value."""
    place = problem["loc"]
    if len(place) > 1 and problem["type"].startswith(SINGLE.get(place[-1], "none")):
        place = place[:-1]
        if isinstance(problem["input"], list):
            return None
    return {**problem, "loc": tuple(part for part in place if not str(part).startswith("list["))}


def explain(problem: Any, model: type[Section]) -> str:
    """Explain one pydantic error of `model`: the field, the value, what is allowed."""
    location, kind = [str(part) for part in problem["loc"]], problem["type"]
    # Each guess at what a value means reads it whole: nothing is guessed of one that fills pages.
    value = problem["input"] if len(repr(problem["input"])) < 10_000 else None
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(location, value, model)
    if kind == "missing":
        given = {"model": "model.path=Qwen/Qwen3-1.7B", "data": "data.source=rows.jsonl"}
        whole = "rollout" in model.model_fields and len(location) < 3
        say = given.get(location[0]) if whole else ""
        return f"{'.'.join(location)} is missing" + (f": say {say}" if say else "")
    return problem_said(problem) + _meant(".".join(location), {**problem, "input": value}, model)


def _unknown(location: list[str], value: Any, model: type[Section]) -> str:
    known = _known(location[:-1], model)
    if (dotted := re.sub("[:/]", ".", ".".join(location))) in fields_of(model):
        ours = typed(dotted, value, model)
        told = f"in a file it is `{_nested(ours)}`" if "." in location[-1] else f"here it is {ours}"
        return f"unknown key {location[-1]!r}: {told}"
    key, colon, rest = location[-1].partition(":")
    if colon and (key in known or answer(key, rest, model)):
        return f"unknown key {location[-1]!r}: YAML needs a space after the colon: `{key}: {rest}`"
    near = nearest(location[-1], known, cutoff=0.8)
    said, others = [], []
    section, fields = ".".join(location), {*fields_of(model)}
    for name, inside in islice(_leaves(section, value), SHOWN_PROBLEMS):
        spelled = ".".join([*location[:-1], near or "", *name[len(section) + 1 :].split(".")])
        slip = near if name == section or spelled in fields else None
        if found := answer(name, inside, model, unless=slip):
            said.append(f"unknown key {name!r}: {found}")
        else:
            others.append(f"unknown key {name!r}" + f": here it is {spelled}" * (spelled in fields))
    if said:
        return "; ".join(said + others)
    if near and isinstance(value, dict) and near in model.model_fields:  # trainer is not train
        own = _known([near], model)
        near = near if any(nearest(str(key), own, cutoff=0.8) for key in value) else None
    where = f"in section {'.'.join(location[:-1])!r}" if len(location) > 1 else "at the top"
    ends = [one for one in known if location[-1] in (one.split("_")[0], one.split("_")[-1])]
    near = near or " or ".join(ends[:2])  # ema_decay for ema
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
    if len(location) > 1 and location[-1].isdecimal():
        hint = f"a number has a point, not a comma: 0.{location[-1]}"
    return f"unknown key {location[-1]!r} {where}; {hint}"


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(full name, value) of what a section holds, such as verl's actor.optim.lr."""
    if isinstance(value, dict) and value:
        for key, inside in value.items():
            yield from _leaves(f"{name}.{key}", inside)
    else:
        yield name, value


def _meant(name: str, problem: Any, model: type[Section]) -> str:
    """Suggest what a wrong value of the field `name` may mean, as the end of a sentence."""
    kind, value = problem["type"], problem["input"]
    section, word = name.rpartition(".")[0], re.sub(r"[\s-]+", "_", str(value).lower())
    if other := VALUES.get(re.sub(r"\.\d+$", "", name), {}).get(word):
        return f"; {other}" if " " in other else f"; did you mean {other!r}?"
    if kind in ("model_type", "model_attributes_type"):
        return _section_meant(name, value, model)
    if value is None and ":" in name:
        pair = name.rpartition(".")[2].replace(":", ": ")
        return f"; YAML needs a space after the colon: `{pair}`"
    if kind == "dict_type":
        columns = "{problem: question}, our column and theirs"
        return f"; write {name}={columns if name.endswith('columns') else '{name: value}'}"
    if isinstance(value, list) and kind not in ("too_short", "value_error"):
        return ONE
    if isinstance(value, dict) and name:  # train.optimizer as a section
        flat = ((key, answer(key, inside, model)) for key, inside in _leaves(name, value))
        return "".join(f"; {key}: {said}" for key, said in flat if said)
    if value is None or value == "None":
        return "; give it a value, or leave it out"
    if not isinstance(value, str):
        said = VALUES.get(name, {}).get("number") if isinstance(value, int | float) else None
        if kind == "int_from_float" and 0 < value < 1:
            said = "it is a count, not a share"
        elif kind.startswith("less_than") and 1 in problem["ctx"].values() and 10 <= value <= 100:
            said = said or f"a share is written as {value / 100:g}"
        return f"; {said}" if said else ""
    if kind == "literal_error":
        if word in TRUTH and "True" in problem["ctx"]["expected"]:
            return f"; write {TRUTH[word]}"
        known = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
        place = f"{section}.{'server' if '://' in value else 'path'}"
        if "/" in value and place in fields_of(model):  # teacher.policy=Qwen/Qwen3-8B
            return f"; did you mean {typed(here(place, model), value, model)}?"
        several = "," in value and {*value.replace(" ", "").split(",")} <= {*known}
        if said := ONE if several else did_you_mean(value, known):
            return said
    # A value of another field of the section, which does not take any text: loss.kl=forward.
    beside = [field for field in fields_of(model) if field.rpartition(".")[0] == section]
    beside = [field for field in beside if "=" not in typed(field, "any", model)]
    told = (typed(field, value, model) for field in beside if word not in TRUTH)
    if other := next((one for one in told if "=" in one), ""):
        return f"; did you mean {other}?"
    if name == "rollout.gpu_memory" and re.search(r"\d\s*[kmg]", value.lower()):
        return "; it is a share of the GPU's memory, such as 0.4"
    return number_meant(value, kind.removesuffix("_parsing"))


def _section_meant(name: str, value: Any, model: type[Section]) -> str:
    """The same where a section is to be, and something else is."""
    above, _, last = name.rpartition(".")
    own = [field for field in fields_of(model) if field.startswith(f"{name}.")]
    key, colon, rest = str(value).partition(":")
    if not own:  # a section of a list, or of several by name
        first = next((one for one in fields_of(model) if one.startswith(f"{above}.")), "")
        field = first.rpartition(".")[2] or "source"  # of data.source
        inside = f"{{{field}: {value if isinstance(value, str) else '…'}}}"
        inside = f"[{inside}]" if last.isdecimal() else f"{{{last}: {inside}}}"
        return f"; each has fields, as in {above}={inside}"
    if colon and f"{name}.{key}" in own:
        return f"; YAML needs a space after the colon: `{key}: {rest}`"
    if isinstance(value, list):
        listed = (said for field in own if "=[" in (said := typed(field, value, model)))
        first = next(listed, f"{own[0]}=…")
        if value and isinstance(value[0], dict):
            first = next((f"{name}.{key}={inside}" for key, inside in value[0].items()), first)
        return f"; it is a section: write its fields without `- `, as in {first}"
    # First the fields that take few values, such as teacher.policy, and this one.
    own.sort(key=lambda field: "=" in typed(field, "any", model))
    takes = (said for field in own if "=" in (said := typed(here(field, model), value, model)))
    if (said := TRUTH.get(str(value).lower())) and own[0].count(".") > 1:  # model.lora
        return f"; {name}={{}} has it, by its defaults" if said == "true" else "; leave it out"
    ours = f"{own[0]}=…" if said else next(takes, f"{own[0]}=…")
    return f"; it is a section, as in {ours} (in a file `{_nested(ours)}`)"


def _nested(assigned: str) -> str:
    """An assignment, such as model.path=X, as a file has it: model: {path: X}."""
    field, _, text = assigned.partition("=")
    *above, last = field.split(".")
    return "".join(f"{one}: {{" for one in above) + f"{last}: {text}" + "}" * len(above)


def number_meant(text: str, kind: str) -> str:
    """What to write for a text that is no number of the kind, int or float, or ""."""
    text = text if len(text) < 100 else ""  # the patterns below take squares of time
    plain = re.sub(r"(?<=\d)[,_](?=\d{3})", "", text).strip(" ,;'\"")
    plain = re.sub(r"^(\d+),(\d+(e[-+]?\d+)?)$", r"\1.\2", plain)  # a decimal comma
    if (form := NUMBERS.get(kind)) and plain != text and re.fullmatch(form, plain):
        return f"; write {plain}"
    counted = rf"(\d+\.?\d*|\.\d+)\s*([kmg]i?b?|%)?\s*({COUNTED})?"
    number = re.fullmatch(counted, text.strip(), re.IGNORECASE)
    if form and number and number[2] == "%":
        share = f"; a share is written as {float(number[1]) / 100:g}"
        return share if kind == "float" else "; it is a count, not a share"
    if form and number and (number[2] or number[3]):
        count = int(float(number[1]) * UNITS[number[2].lower()]) if number[2] else number[1]
        return f"; write {count}, without a unit"
    if form and re.fullmatch(rf"({form}[,\s]+)+{form}", text.strip("[]() ")):
        return ONE
    if form and text.lower() in ("greedy", "zero", "off", "no", "none", "never"):
        return "; write 0"
    return "; write a number" if form and text.lower() in ("yes", "true", "all", "auto") else ""


def _known(location: Sequence[str], model: Any) -> list[str]:
    for part in location:
        field = None if part.isdigit() else model.model_fields.get(part)
        model = (_section_in(field.annotation) or model) if field else model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or that the items of its list are."""
    inside = map(_section_in, getattr(annotation, "__args__", ()))
    return section_of(annotation) or next(filter(None, inside), None)
