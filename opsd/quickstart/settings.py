"""A quickstart's settings, from the YAML file beside this one, and what it was asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd.common.templates import shipped
from opsd.config.yaml import load_yaml


def settings(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the config's sections that all methods share, each method's own) of `name`.yaml."""
    text = Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8")
    found = load_yaml(text)
    for text in found["shared"]["prompts"].values():
        shipped(text)
    return found["shared"], found["methods"]


@dataclass(frozen=True)
class Asked:
    """What decides a quickstart's figures, except its methods."""

    tiny: bool = False  # the tiny model instead of the real one
    seed: int = 0
    model: str | None = None  # another chat model's directory or hub name instead of SmolLM2
    # Stop each method, and the real model's cold start, after so many steps.
    steps: int | None = None
    problems: int | None = None  # held-out problems; None: 400 worksheets or 300 sums
    # How many worked solutions there are; None: as many as a method needs.
    solutions: int | None = None
    # How they are written, one of SOLUTION_STYLES; for the real model.
    solution_style: str = "words"
    # `[method.]section.field=value`, of all methods where none is named.
    overrides: list[str] = field(default_factory=list)
