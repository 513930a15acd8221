"""Flat names of fields, as keyword arguments of `OPSDConfig`: learning_rate → train.learning_rate.

A field's flat name is its own name; if that is ambiguous, the names of its sections come first:
rollout_temperature and loss_temperature, lora_rank, output_dir.
"""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from os import PathLike, fspath
from typing import Any, get_origin

from opsd.common.errors import UserError
from opsd.common.near import nearest
from opsd.config.base import Section
from opsd.config.foreign import answer, section_of

WHAT_IT_NAMES = {"model": "path", "data": "source", "output": "dir"}
"""Sections that may be given as a single string → the field that the string sets."""

TRAINER_TAKES = ("peft_config", "reward_funcs", "train_dataset", "eval_dataset", "callbacks")


def nested(values: Mapping[str, Any], config: type[Section]) -> dict[str, Any]:
    """Put fields with flat names into their sections. Raises UserError for a name that fits no
    field or several.

    >>> from opsd.config.config import Config
    >>> nested({"method": "grpo", "learning_rate": 1e-5, "lora_rank": 8}, Config)
    {'method': 'grpo', 'train': {'learning_rate': 1e-05}, 'model': {'lora': {'rank': 8}}}
    """
    fields = dict(_fields(config))
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for name in sorted(values, key=lambda name: name not in config.model_fields):  # sections first
        value = fspath(values[name]) if isinstance(values[name], PathLike) else values[name]
        try:
            field = _field(name, value, fields, config)
        except UserError as error:
            wrong.append(str(error))
            continue
        if isinstance(value, Section):
            value = value.model_dump(exclude_unset=True)
        if field in WHAT_IT_NAMES and not isinstance(value, Mapping):
            value = {WHAT_IT_NAMES[field]: value}
        *above, last = field.split(".")
        place = found
        for part in above:
            place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"{'.'.join(above)} is {place!r}: it must be a mapping")
        if last in place:
            raise UserError(f"{field} is given twice")
        place[last] = deepcopy(dict(value)) if isinstance(value, Mapping) else value
    if wrong:
        raise UserError("; ".join(wrong))
    return found


def _fields(model: type[Section], above: str = "") -> Iterator[tuple[str, set[str]]]:
    """Yields (full name of a field or section, the flat names that it may have)."""
    for name, field in model.model_fields.items():
        path = f"{above}{name}"
        parts = path.split(".")
        yield path, {"_".join(parts[start:]) for start in range(len(parts))}
        inside = section_of(field.annotation)
        if inside and get_origin(field.annotation) is not list:
            yield from _fields(inside, f"{path}.")


def flat_name(field: str, config: type[Section]) -> str:
    """The shortest flat name of a field that no other has."""
    fields = dict(_fields(config))
    every = [one for names in fields.values() for one in names]
    alone = [one for one in fields.get(field, ()) if every.count(one) == 1]
    return min(alone, key=len, default=field)


def _field(name: str, value: Any, fields: dict[str, set[str]], config: type[Section]) -> str:
    if name in fields:  # a top-level field or section
        return name
    found = [field for field, names in fields.items() if name in names]
    whole = [field for field in found if field.replace(".", "_") == name]
    if len(found := whole or found) == 1:
        return found[0]
    if found:
        ways = " or ".join(f"{field.replace('.', '_')} ({field})" for field in found)
        raise UserError(f"{name} is ambiguous: say {ways}")
    if name in TRAINER_TAKES:
        raise UserError(f"{name} belongs to the trainer: OPSDTrainer({name}=…)")
    every = [one for names in fields.values() for one in sorted(names)]
    near = nearest(name, every)
    if said := answer(name, value, config, unless=nearest(name, every, cutoff=0.9)):
        said = re.sub(r"\w+(\.\w+)+", lambda found: flat_name(found[0], config), said)
        raise UserError(f"unknown key {name!r}: {said}")
    whose = next((field for field, names in fields.items() if near in names), "")
    hint = f"did you mean {near} ({whose})?" if near else "docs/options.md lists them"
    raise UserError(f"unknown key {name!r}; {hint}")
