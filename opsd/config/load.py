"""Read a run's config from a YAML file, check it, and describe its fields.

Unknown keys are errors that suggest the nearest name. Nothing here imports torch, so that a bad
file is refused within a second.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from opsd.common.errors import UserError
from opsd.common.files import write_file
from opsd.config.config import Config
from opsd.config.explain import explain_all
from opsd.config.foreign import here, section_of
from opsd.config.yaml import load_yaml, read_yaml

STUDY = {"quickstart", "methods", "variants"}
"""Top-level keys that only a study file has; `opsd compare` runs those."""

METHODS_OWN = ("method", "loss", "teacher")
"""Top-level keys that a run of `then` does not inherit, since they belong to the method."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.field=value` overrides, and check it. Raises UserError."""
    first, *rest = load_recipe(path, overrides)
    if rest:
        runs = f"{1 + len(rest)} runs (then)"
        raise UserError(f"CONFIG is {str(path)!r}: a recipe of {runs}, for `opsd train` only")
    return first


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> list[Config]:
    """Like `load_config`, for a file that may continue with `then`; returns each run's config.

    A run of `then` starts from the model of the previous run, and inherits what it does not set of
    data, prompts, rollouts, training and evaluation. Raises UserError.
    """
    path = Path(path)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}: it needs model:, data: and so on")
    if STUDY & values.keys():
        raise UserError(f"CONFIG is {str(path)!r}: a study; `opsd compare {path}` runs it")
    # A section whose lines are all commented out reads as null: treat it as absent.
    values = {key: value for key, value in values.items() if value is not None}
    values = with_overrides(values, overrides)
    then = values.pop("then", None)
    runs = [parse_config(values)]
    while then is not None:
        if not isinstance(then, dict):
            raise UserError(f"then is {then!r}: it must hold what the next run changes")
        before = runs[-1].output.dir
        own = {key: value for key, value in values.items() if key not in METHODS_OWN}
        model = {"path": str(Path(before) / "model"), "revision": None, "gguf_file": None}
        own = merge(own, {"output": {"dir": f"{before}-then"}, "model": model})
        values = merge(own, then)
        then = values.pop("then", None)
        try:
            runs.append(parse_config(values))
        except UserError as error:
            raise UserError(f"then: {error}") from None
        if runs[-1].output.dir in [run.output.dir for run in runs[:-1]]:
            raise UserError(f"then: output.dir is {runs[-1].output.dir!r}, an earlier run's")
    return runs


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested dictionaries into a new one; `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        both = isinstance(value, dict) and isinstance(known, dict)
        merged[key] = merge(known, value) if both else value
    return merged


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Write `section.field=value` overrides into the sections, in place. Raises UserError."""
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = name.split(".")
        if not equals or not all(keys):
            found = here(name, Config) if name else ""
            hint = f", as in {found}=…" if found else ""
            raise UserError(
                f"override is {override!r}: it must look like train.learning_rate=1e-5{hint}"
            )
        place = values
        for key in keys[:-1]:
            if place.get(key) is None:  # the section is absent or null
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict):
                said = f"{key!r} is {place!r} in the config, not a section"
                raise UserError(f"override is {override!r}: {said}")
        try:
            place[keys[-1]] = load_yaml(text)
        except yaml.YAMLError:
            place[keys[-1]] = text
    return values


def parse_config(values: dict[str, Any]) -> Config:
    """Check a dictionary of sections and return the Config. Raises UserError.

    >>> config = {"model": {"path": "Qwen/Qwen3-1.7B"}, "data": {"source": "rows.jsonl"}}
    >>> parse_config(config).loss.divergence
    'forward_kl'
    >>> parse_config({**config, "trian": {"steps": 10}})
    Traceback (most recent call last):
    opsd.common.errors.UserError: unknown key 'trian' at the top; did you mean 'train'?
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(explain_all(error, Config)) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config (all defaults filled in) as YAML."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=100)
    write_file(path, text)


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Yield (section, name, default, description) of every field, for `--help`."""
    for section, field in Config.model_fields.items():
        if section == "method":
            yield "", "method", "opsd", f"{field.description} (opsd | grpo | sft | distill)"
            continue
        for name, inner in field.annotation.model_fields.items():
            yield section, name, *_field(inner)
            inside = section_of(inner.annotation)
            for deeper, field_inside in (inside.model_fields if inside else {}).items():
                yield section, f"{name}.{deeper}", *_field(field_inside)


def _field(field: FieldInfo) -> tuple[str, str]:
    """A field's default and description, as text."""
    default = "required" if field.is_required() else str(field.get_default())
    if getattr(kind := field.annotation, "__origin__", None) is Literal:
        return default, f"{field.description} ({' | '.join(map(str, kind.__args__))})"
    return default, field.description
