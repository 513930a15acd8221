"""Jinja templates for the roles' messages, sandboxed. Needs no torch."""

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opsd.errors import UserError

ROLLOUT_NAMES = frozenset({"rollout", "peers"})
"""What a template may use beside the row's columns once there are rollouts."""

# Sandboxed, since a config file may come from a stranger; strict, since a misspelt column must not
# become "".
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined)


def compile_template(name: str, text: str) -> Template:
    """The template `prompts.<name>`. Raises UserError where it is none."""
    try:
        return _ENVIRONMENT.from_string(text)
    except TemplateError as error:
        raise UserError(f"prompts.{name} is not a Jinja template: {error}") from None


def names(text: str) -> set[str]:
    """The variables that a template takes from outside; none where it is not a template."""
    try:
        return meta.find_undeclared_variables(_ENVIRONMENT.parse(text))
    except TemplateError:
        return set()


def over_rollouts(text: str) -> bool:
    """Whether a template needs a problem's rollouts, and so can only be filled in after them."""
    return bool(names(text) & ROLLOUT_NAMES)
