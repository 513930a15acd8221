"""What other trainers' names and values are called here, and what to do where there is no field.

The tables are `elsewhere.toml`, `nowhere.toml` and `values.toml`.
"""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from yaml import YAMLError

from opsd.common.errors import LONGEST
from opsd.common.files import read_toml
from opsd.common.near import nearest
from opsd.config.base import Section
from opsd.config.yaml import load_yaml

ELSEWHERE: dict[str, str] = read_toml(__file__, "elsewhere")
"""A name of another trainer, or its last parts → our field's, after a comma what to know of it."""

NOWHERE: dict[str, str] = {
    name: said for said, names in read_toml(__file__, "nowhere").items() for name in names
}
"""Other trainers' names of what has no field here, also as patterns → what to do instead."""

VALUES: dict[str, dict[str, str]] = read_toml(__file__, "values")
"""Field → {another trainer's name of a value: our name}."""

WORDS: dict[str, Any] = read_toml(__file__, "words")
"""How other names are read: words that add nothing, that mean the same, that say whose it is."""

VAGUE = {*"length target format on other size log window scale special path type alpha".split()}
"""Names of our fields that tell too little without their section."""

OPEN = ("data.columns.", "data.options.", "prompts.student_chat.")
"""Fields that hold names of others."""

OFF = ("", "false", "none", "no", "off", "null", "0")


def answer(name: str, value: Any, model: type[Section], unless: str | None = None) -> str:
    """What to say of a name that is no field: `here it is train.steps=5`, why there is none, or "".

    unless: a section or field that is spelled alike; then another trainer's name counts only where
    it is exactly that.
    """
    if "rollout" not in model.model_fields:  # a study
        found = ELSEWHERE.get(name.rpartition(".")[2], "")
        return f"here it is {found}" if found in model.model_fields else ""
    plain = re.sub(r"[\s-]+", "_", name)
    if "." in plain and plain.replace(".", "_") not in ELSEWHERE:  # sampling.num_samples
        ours = _in_our_section(plain)
        plain = ours if ours in ELSEWHERE or ours in fields_of(model) else plain
    above, _, last = plain.rpartition(".")
    every = [*fields_of(model)]
    if not any(last in _tails(one) for one in every) and (said := reason(plain)):
        blank = "nnodes M" if "nnodes M" in said else "-node N"
        count = re.search(r"\d+$", str(value))
        return said.replace(blank, f"{blank[:-1]}{count[0]}") if count else said
    known = last in ELSEWHERE or any(one.endswith(f".{last}") for one in every)
    if not known and (no := re.match("(no|disable|without)_", last)):
        off = str(value).lower() in OFF  # no_share=false: it is on
        return answer(f"{above}.{last[no.end() :]}".lstrip("."), off, model)
    found = _ours(plain, model, unless)
    if not found and last in ("name", "type", "kind", "class", "enabled"):  # optimizer.name
        found = _ours(above, model, unless)
    if not found or (said := typed(found, value, model)).startswith("leave it out"):
        return said if found else ""
    return f"here it is {said}"


def reason(name: str) -> str:
    """Why there is no field for another trainer's name, or ""."""
    *ends, last = _ends(name)
    if end := next((end for end in ends if end in ELSEWHERE or end in NOWHERE), None):
        return NOWHERE.get(end, "")
    if part := next((part for part in name.split(".")[:-1] if part in NOWHERE), None):
        return NOWHERE[part]
    patterns = [one for one in NOWHERE if "*" in one]
    if one := next((one for one in patterns if "." in one and fnmatchcase(name, one)), None):
        return NOWHERE[one]
    if said := NOWHERE.get(last) or ELSEWHERE.get(last) or _gists().get(_gist(last)):
        return said if said in NOWHERE.values() else ""
    of_last = (one for one in patterns if "." not in one and fnmatchcase(last, one))
    return next((NOWHERE[one] for one in of_last), "")


def here(name: str, model: type[Section]) -> str:
    """Our full name for a field called `name` elsewhere or in another section; "" if unknown."""
    return _ours(re.sub(r"[\s-]+", "_", name), model)


def _ours(name: str, model: type[Section], unless: str | None = None) -> str:
    above, _, last = name.rpartition(".")
    of_whom = [word for whose in WORDS["whose"].values() for word in whose["words"]]
    found = _found(name, model, unless)
    if not found and above and last in of_whom:  # data.test
        found = _found(above, model, unless)
    if ours := _in_our_section(name):
        found = found or _found(ours, model, unless)
        section = f"{ours.partition('.')[0]}."
        found = " or ".join(one for one in found.split(" or ") if one.startswith(section)) or found
    said = {*name.split("."), *re.split(r"[._]", name.replace("actor_rollout_ref.", ""))}
    for whose in WORDS["whose"].values():  # of the teacher, of the evaluation
        found = whose.get(found.partition(", ")[0], found) if said & {*whose["words"]} else found
    return found


def _in_our_section(name: str) -> str:
    """rollout.top_p for sampling.top_p and sampling_top_p; "" if it names no section so."""
    first, _, rest = name.replace("_", ".", "." not in name).partition(".")
    section = WORDS["sections"].get(first)
    return f"{section}.{rest}" if section and rest else ""


def _gist(name: str, section: str = "") -> str:
    """The words that tell names apart: those of max_num_steps are those of total_steps. section:
    leave out the words for it, such as template of prompts.student_template."""
    words = {WORDS["same"].get(word, word) for word in name.lower().split("_")}
    less = {word for word, ours in WORDS["sections"].items() if ours == section} | {section}
    return " ".join(sorted(words - less - {*WORDS["filler"]}))


@cache
def _gists() -> dict[str, str]:
    """The gist of other trainers' names → our field, or why there is none, where all mean one."""
    meant: dict[str, set[str]] = {}
    for name, ours in (NOWHERE | ELSEWHERE).items():
        if not {".", "*"} & {*name} and (name in ELSEWHERE or " " in _gist(name)):
            meant.setdefault(_gist(name), set()).add(ours)
    return {gist: min(ours) for gist, ours in meant.items() if gist and len(ours) == 1}


def _found(name: str, model: type[Section], unless: str | None) -> str:
    every, (first, _, rest) = [*fields_of(model)], name.partition(".")
    # The same words in the section that is named: loss.jsd.beta, eval.interval, output.folder.
    gist = _gist(rest.rpartition(".")[2], first)
    inside = [field for field in every if gist and field.rpartition(".")[0] == first]
    inside = [name] if name in every else inside
    own = [field for field in inside if _gist(field.rpartition(".")[2], first) == gist]
    if name not in ELSEWHERE and len(own) == 1:
        return own[0]
    for end in _ends(name):
        if end in ELSEWHERE:
            return ELSEWHERE[end]
        if not unless and (found := [field for field in every if end in _tails(field)]):
            return found[0]
    if unless:
        return ""
    last = name.rpartition(".")[2]
    found = [field for field in every if field.rpartition(".")[2] == last]
    least = min((field.count(".") for field in found), default=0)
    if found and (last not in VAGUE or (last == name and least == 1)):
        return " or ".join(field for field in found if field.count(".") == least)
    if last not in VAGUE and (gist := _gist(last)) in _gists():
        return _gists()[gist]
    spelled = ELSEWHERE | {field.rpartition(".")[2]: field for field in reversed(every)}
    plain = last not in VAGUE and 4 < len(last) < 50
    near = nearest(last, spelled, cutoff=0.9) if plain else None
    return spelled[near] if near else ""


def _tails(field: str) -> set[str]:
    """{"reward.format", "reward_format", …}: a field's last parts, of which there are several."""
    tails = [end for end in _ends(field) if "." in end]
    return {*tails, *(tail.replace(".", "_") for tail in tails)}


def _ends(name: str) -> list[str]:
    """["a.b.c", "a_b_c", "b.c", "b_c", "c"], since wandb.project is wandb_project; of our sections
    ["a.b.c", "b.c", "c"]."""
    parts = name.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts))]
    if parts[0] not in WORDS["sections"].values():
        ends = [one for end in ends for one in (end, end.replace(".", "_"))]
    return [*dict.fromkeys(ends)]


def typed(found: str, value: Any, model: type[Section]) -> str:
    """What to type for `found`, as `here` returns it: rollout.engine=vllm for "rollout.engine,
    'vllm'". It has the value where the field takes it and no note says that it means another."""
    field, _, note = found.partition(", ")
    word = re.sub(r"(?<=\w)[\s-]+", "_", str(value).lower())
    if quoted := re.fullmatch(r"'([\w.-]+)'(?: or '([\w.]+)')?", note):
        if word in OFF and not quoted[2]:
            return "leave it out: that is off"
        return f"{field}={quoted[2] if word in OFF else quoted[1]}"
    if field.startswith(OPEN):
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return _with(field, text) if "chat" in field or isinstance(value, str) else field
    if note.startswith("a section: "):
        off = "leave it out: that is off" if word in OFF else note.removeprefix("a section: ")
        return VALUES.get(field, {}).get(word, off)
    if more := re.fullmatch(r"with ([\w.]+=\w+)", note):  # two assignments
        return f"{_assigned(field, value, model)} {more[1]}"
    if note == "FILE.py:FUNCTION" and re.fullmatch(r".+\.py:\w+", str(value)):
        return f"{field}={value}"
    if note == "1 less the rate" and re.fullmatch(r"[01]?\.?\d+", str(value)):
        return f"{field}={1 - float(value):g}"
    if word == "false" and note:
        return "leave it out: that is off"
    if note or not (every := field.split(" or ")) or {*every} - {*fields_of(model)}:
        return f"{field} ({note})" if note else found
    # The fields that take the value; words with blanks are a prompt.
    words = bool(re.search(r"\s|{{", str(value)))
    every = [one for one in every if one.startswith("prompts.") == words] or every
    said = [_assigned(one, value, model) for one in every]
    return " or ".join([one for one in said if "=" in one] or said)


def _assigned(field: str, value: Any, model: Any) -> str:
    """`field=value`, in our words, if the field takes the value; otherwise the field's name."""
    *above, last = field.split(".")
    for part in above:
        annotation = model.model_fields[part].annotation
        if get_origin(annotation) in (list, dict):  # teacher.mix: it has no value of its own
            return field
        model = section_of(annotation)
    kind = model.model_fields[last]
    if isinstance(value, list):  # such as verl's ['console', 'wandb']
        words = [VALUES.get(field, {}).get(str(one), one) for one in value]
        value = [one for one in words if not str(one).startswith("leave it out")]
    word = re.sub(r"(?<=\w)[\s-]+", "_", str(value).lower())
    word = word if word in (names := VALUES.get(field, {})) else word.rpartition(".")[2]
    said = names.get(word, value)  # also for torch.optim.AdamW
    if isinstance(said, str) and said != value and " " in said:
        return f"{field} ({said.removesuffix('?')})"
    if isinstance(said, str) and "list" in str(kind.annotation) and "," in said:
        said = f"[{said.strip('[]')}]"
    text = said if isinstance(said, str) else json.dumps(said, default=str)
    try:
        model.model_validate({last: load_yaml(text)})
    except ValidationError as error:
        if any(problem["loc"][:1] == (last,) for problem in error.errors()):
            known = [str(one) for one in get_args(kind.annotation) if isinstance(one, str)]
            if isinstance(value, int | float) and "number" in VALUES.get(field, {}):
                known = [VALUES[field]["number"]]
            if value is False:
                return "leave it out: that is off"
            return f"{field} ({', '.join(known)})" if known else field
    except YAMLError:
        return field
    return _with(field, text)


def _with(field: str, text: str) -> str:
    """`field=text`; the field alone if that would be a long line, or several."""
    return field if len(text) > LONGEST or len(text.splitlines()) > 1 else f"{field}={text}"


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
