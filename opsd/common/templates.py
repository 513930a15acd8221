"""Jinja templates for the roles' messages, sandboxed. Needs no torch."""

from typing import Any

from jinja2 import Template, TemplateError, meta

from opsd.common.errors import UserError
from opsd.common.template_sandbox import Sandbox

ROLLOUT_NAMES = frozenset({"rollout", "peers"})
"""What a template may use beside the row's columns once there are rollouts."""

_ENVIRONMENT = Sandbox()


def compile_template(name: str, text: str) -> Template:
    """The template `prompts.<name>`. Raises UserError where it is none."""
    _ENVIRONMENT.begin()
    try:
        return _ENVIRONMENT.from_string(text)
    except (TemplateError, RecursionError, ValueError) as error:  # ValueError: an endless number
        raise UserError(f"prompts.{name} is not a Jinja template: {error}") from None


def fill_in(template: Template, values: dict[str, Any]) -> str:
    """The template's text for these values. Raises whatever its expressions do."""
    _ENVIRONMENT.begin()
    text = template.render(values)
    text.encode()  # half a surrogate pair is no text that a tokenizer could take
    return text


def names(text: str) -> set[str]:
    """The variables that a template takes from outside; none where it is not a template."""
    try:
        return meta.find_undeclared_variables(_ENVIRONMENT.parse(text))
    except (TemplateError, RecursionError, ValueError):
        return set()


def over_rollouts(text: str) -> bool:
    """Whether a template needs a problem's rollouts, and so can only be filled in after them."""
    return bool(names(text) & ROLLOUT_NAMES)
