"""Dataset rows → the student's and the teacher's contexts, as token ids.

Both roles see a user message made from a Jinja template over the row's columns, put through the
model's own chat template. A rollout's tokens are appended to both contexts as ids: nothing is ever
decoded and tokenised again. The state at a context's last token, be it the end of a thinking tag
that the chat template or a prefill has written, predicts the rollout's first token in both roles.

The teacher's template may also use `rollout`, the rollout that the teacher is to score, and
`peers`, the problem's other rollouts (`opsd.grading.rewards.GradedRollout`). Such a template is
filled in for each rollout, once all are there. An empty message means that there is nothing to
teach.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd.common.errors import UserError
from opsd.common.templates import ROLLOUT_NAMES, compile_template, fill_in, names, over_rollouts
from opsd.config.sections import PromptsSection
from opsd.data.rows import Row


@dataclass(frozen=True)
class Context:
    """One problem as both roles see it: token ids that end where the solution is to begin.

    The teacher's is None where it is made of rollouts.
    """

    student: list[int]
    teacher: list[int] | None


class Prompts:
    """Renders rows for one tokenizer. Raises UserError for templates that cannot work."""

    def __init__(self, section: PromptsSection, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise UserError(
                "model.path has a tokenizer without a chat template: use an instruction-tuned "
                "model, or add a chat_template.jinja to its directory"
            )
        self.section, self.tokenizer = section, tokenizer
        self.over_rollouts = over_rollouts(section.teacher)
        self._templates = {
            name: compile_template(name, getattr(section, name))
            for name in ("student", "teacher", "target")
        }

    def context(self, row: Row) -> Context:
        """The ids of both roles' contexts for this row."""
        teacher = None if self.over_rollouts else self.ids(row, "teacher")
        return Context(self.ids(row, "student"), teacher)

    def ids(self, row: Row, role: str) -> list[int]:
        """The ids of one role's context."""
        return self._ids(self.render(row, role), role)

    def ending(self, role: str) -> str:
        """What stands between one role's message and its answer: the generation prompt, with what
        it says of thinking, and the prefill."""
        mark = "\u2042the message\u2042"
        return self._text(mark, role).rpartition(mark)[2]

    def teacher_of(self, row: Row, rollout: Any, peers: Sequence[Any]) -> list[int] | None:
        """The ids of the teacher's context for one rollout; None where its message is empty."""
        for name in ROLLOUT_NAMES & row.columns.keys() & names(self.section.teacher):
            raise UserError(
                f"prompts.teacher uses {name!r}, which is a column of the data too: rename the "
                f"column; in the template {name!r} means rollouts"
            )
        message = self.render(row, "teacher", rollout=rollout, peers=list(peers))
        return self._ids(message, "teacher") if message.strip() else None

    def _ids(self, message: str, role: str) -> list[int]:
        # The chat template has written the special tokens already: BOS must not come twice.
        return self.tokenizer(self._text(message, role), add_special_tokens=False).input_ids

    def _text(self, message: str, role: str) -> str:
        messages = [{"role": "user", "content": message}]
        system = getattr(self.section, f"{role}_system")
        system = self.section.system if system is None else system
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        arguments: dict[str, Any] = getattr(self.section, f"{role}_chat")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **arguments
            )
        except (
            Exception
        ) as error:  # such as one that takes no system message; it can raise anything
            raise UserError(f"model.path has a chat template that refuses: {error}") from None
        return text + getattr(self.section, f"{role}_prefill")

    def target(self, row: Row) -> list[int]:
        """The ids of the text that SFT learns for this row, with the token that ends a turn."""
        ids = self.tokenizer(self.render(row, "target"), add_special_tokens=False).input_ids
        return [*ids, self.tokenizer.eos_token_id]

    def render(self, row: Row, name: str, **more: Any) -> str:
        """The filled-in template `prompts.<name>`; `more`: what it may use beside the columns."""
        values = {
            **row.columns,
            "problem": row.problem,
            "solution": row.solution,
            "answer": row.answer,
            **more,
        }
        try:
            return fill_in(self._templates[name], values)
        except Exception as error:  # a template's expressions can raise anything, as 1 / 0 does
            raise UserError(
                f"prompts.{name} cannot be filled in: {error}; columns: {', '.join(sorted(values))}"
            ) from None
