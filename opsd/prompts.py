"""Dataset rows → the student's and the teacher's contexts, as token ids.

Both roles see a user message made from a Jinja template over the row's columns, put through the
model's own chat template. A rollout's tokens are appended to both contexts as ids: nothing is ever
decoded and tokenised again.
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from opsd.config import PromptsSection
from opsd.data import Row
from opsd.errors import UserError


@dataclass(frozen=True)
class Context:
    """One problem as both roles see it: token ids that end where the solution is to begin."""

    student: list[int]
    teacher: list[int]


class Prompts:
    """Renders rows for one tokenizer. Raises UserError for templates that cannot work."""

    def __init__(self, section: PromptsSection, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise UserError(
                "model.path has a tokenizer without a chat template: use an instruction-tuned "
                "model, or add a chat_template.jinja to its directory"
            )
        self.section, self.tokenizer = section, tokenizer
        # Sandboxed, since a config file may come from a stranger; strict, since a misspelt column
        # must not become "".
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        self._templates = {
            name: _compile(environment, f"prompts.{name}", getattr(section, name))
            for name in ("student", "teacher", "target")
        }

    def context(self, row: Row) -> Context:
        """The ids of both roles' contexts for this row."""
        return Context(self.ids(row, "student"), self.ids(row, "teacher"))

    def ids(self, row: Row, role: str) -> list[int]:
        """The ids of one role's context."""
        messages = [{"role": "user", "content": self.render(row, role)}]
        if self.section.system is not None:
            messages.insert(0, {"role": "system", "content": self.section.system})
        arguments: dict[str, Any] = getattr(self.section, f"{role}_chat")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **arguments
            )
        except TemplateError as error:  # such as one that takes no system message
            raise UserError(f"model.path has a chat template that refuses: {error}") from None
        # The chat template has written the special tokens already: BOS must not come twice.
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def target(self, row: Row) -> list[int]:
        """The ids of the text that SFT learns for this row, with the token that ends a turn."""
        ids = self.tokenizer(self.render(row, "target"), add_special_tokens=False).input_ids
        return [*ids, self.tokenizer.eos_token_id]

    def render(self, row: Row, name: str) -> str:
        """The filled-in template `prompts.<name>`."""
        values = {
            **row.columns,
            "problem": row.problem,
            "solution": row.solution,
            "answer": row.answer,
        }
        try:
            return self._templates[name].render(values)
        except Exception as error:  # a template's expressions can raise anything, as 1 / 0 does
            raise UserError(
                f"prompts.{name} cannot be filled in: {error}; columns: {', '.join(sorted(values))}"
            ) from None


def _compile(environment: ImmutableSandboxedEnvironment, name: str, text: str) -> Template:
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise UserError(f"{name} is not a Jinja template: {error}") from None
