"""Jinja templates for the roles' messages, sandboxed. Needs no torch."""

from typing import Any

from jinja2 import Template, TemplateError, meta

from opsd.common.errors import UserError
from opsd.common.template_sandbox import Sandbox

ROLLOUT_NAMES = frozenset({"rollout", "peers"})
"""What a template over rollouts may use beside the row's columns."""

_ENVIRONMENT = Sandbox()


def compile_template(name: str, text: str) -> Template:
    """The template `prompts.<name>`. Raises UserError for text that is no template."""
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
    """The variables that a template uses but does not set; none for text that is no template."""
    try:
        return meta.find_undeclared_variables(_ENVIRONMENT.parse(text))
    except (TemplateError, RecursionError, ValueError):
        return set()


def over_rollouts(text: str) -> bool:
    """Whether a template uses a problem's rollouts, so that it is rendered once they are there."""
    return bool(names(text) & ROLLOUT_NAMES)
