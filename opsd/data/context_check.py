"""Whether what a row says reaches the contexts: the problem both, the solution the teacher's.

A text is looked for in the filled-in template as it is. A template may trim, escape or shorten it:
where it is not found, the template is filled in once more with a mark before each of its words, and
one of them has to come out.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from opsd.common.errors import UserError
from opsd.common.templates import names
from opsd.data.chat import PROBE
from opsd.data.prompts import Prompts
from opsd.data.rows import Row

SHORT = 16  # characters of a text that may stand in a message by chance


class ContextCheck:
    """Called with each row before training. Raises UserError for the first that does not arrive.

    Args:
        roles: whose contexts are made of a row alone.
        differ: the teacher has the student's own weights, so that it teaches by its context alone.
        targets: prompts.target is what is learnt.
    """

    def __init__(
        self, prompts: Prompts, roles: Collection[str], differ: bool = False, targets: bool = False
    ):
        self.prompts, self.roles, self.targets = prompts, roles, targets
        self.differ = differ and "teacher" in roles
        self.apart = False  # whether equal messages make different contexts
        self.controls = prompts.chats["student"].control_tokens
        self.found: dict[str, list[int]] = {}  # such tokens in the rows' texts, with their rows
        self.named = {name: names(template) for name, template in prompts.templates.items()}
        asked = [("teacher", "solution")] if "teacher" in roles else []
        asked += [("target", "solution")] if targets else []
        asked += [("teacher", "problem")] if "teacher" in prompts.over_rollouts else []
        for name, what in asked:
            template = prompts.templates[name]
            plain = _single(template, [what]) or ("{{" not in template and repr(template))
            if plain and what not in self.named[name]:
                raise UserError(
                    f"prompts.{name} leaves the {what} out, {plain} is plain text: write "
                    f"{{{{ {what} }}}}"
                )

    def __call__(self, number: int, row: Row) -> None:
        """Check the `number`-th row, from 1."""
        messages = {role: self.prompts.render(row, role) for role in self.roles}
        for role, message in messages.items():
            if not _stands(row.problem, message) and not self._arrives(row, role, problem=True):
                self._refuse(role, number, row, "problem")
        if (
            "solution" in self.named["teacher"] - self.named["student"]
            and "teacher" in messages
            and not _stands(row.solution, messages["teacher"])
            and not self._arrives(row, "teacher", problem=False)
        ):
            self._refuse("teacher", number, row, "solution")
        if "student" in messages:
            self._choices_arrive(number, row, messages["student"])
        for token in self.controls:
            if any(token in text for text in messages.values()) or (
                self.targets and token in row.solution
            ):
                self.found.setdefault(token, []).append(number)
        alike = messages.get("student") == messages.get("teacher")
        if self.differ and (number == 1 or (alike and not self.apart)):
            context = self.prompts.context(row)
            if context.student == context.teacher:
                raise UserError(
                    f"prompts.teacher: both roles' contexts are equal in row {number} "
                    f"({row.problem[:40]!r}), so that there is nothing to teach: write "
                    "{{ solution }} or another column there, or tell the teacher more in "
                    "prompts.teacher_system"
                )
            self.apart = alike  # by a system message, say

    def notes(self) -> Iterator[str]:
        """What was seen in all rows that a user should know."""
        for token, rows in self.found.items():
            yield (
                f"{len(rows)} rows hold {token!r}, such as row {rows[0]}: inside of a text too the "
                "tokenizer makes it the token by which the chat template parts turns; take it out "
                "of the data if that is not meant"
            )

    def _choices_arrive(self, number: int, row: Row, message: str) -> None:
        """Raises UserError where the answer is one of several that the student is not shown."""
        name, texts = given_choices(row.columns)
        answers = {*texts, *"ABCDEFGHIJ"[: len(texts)], *map(str, range(len(texts)))}
        if row.answer in answers and not all(text.strip() in message for text in texts):
            raise UserError(
                f"{self.prompts.field('student')} leaves the column {name!r} out in row {number} "
                f"({row.problem[:40]!r}), of which the answer {row.answer!r} is one: write "
                f"{{{{ {name} }}}}, or a loop over it"
            )

    def _arrives(self, row: Row, role: str, problem: bool) -> bool:
        """Whether the problem, or any other text, comes out, however the template changes it."""

        def chosen(text: str) -> bool:
            return text.strip() != "" and (text.strip() == row.problem.strip()) == problem

        marked = {name: _marked(getattr(row, name), chosen) for name in (*row.texts, "columns")}
        try:
            return PROBE in self.prompts.render(replace(row, **marked), role)
        except UserError:  # the template reckons with the text
            return True

    def _refuse(self, role: str, number: int, row: Row, what: str) -> None:
        single = _single(self.prompts.templates[role], [what, *row.columns])
        said = f"; {single} in single braces is plain text" if single else ""
        name = single.strip("{} ") if single else what
        raise UserError(
            f"{self.prompts.field(role)} leaves the {what} out of the {role}'s context in row "
            f"{number} ({row.problem[:40]!r}){said}: write {{{{ {name} }}}}"
        )


def given_choices(columns: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The column that holds the answers to choose from, and these; ("", []) where there is none.

    A list of texts, an object of them by letters, or `{"text": […], "label": […]}`.
    """
    for name in ("choices", "options"):
        value = columns.get(name)
        if isinstance(value, Mapping):
            value = value.get("text", [value[k] for k in value if re.fullmatch("[A-J]", str(k))])
        if isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value):
            return name, value
    return "", []


def _stands(text: str, message: str) -> bool:
    text = text.strip()
    return len(text) >= SHORT and text in message


def _marked(value: Any, chosen: Callable[[str], bool]) -> Any:
    """A column with marks before each word of the chosen texts, wherever they stand inside."""
    if isinstance(value, str):
        return re.sub(r"^|\s+|$", rf"\g<0>{PROBE}", value) if chosen(value) else value
    if isinstance(value, dict):
        return {key: _marked(inside, chosen) for key, inside in value.items()}
    return [_marked(inside, chosen) for inside in value] if isinstance(value, list) else value


def _single(template: str, columns: Collection[str]) -> str | None:
    r"""The first `{column}` of a template: neither `{{ column }}` nor LaTeX's `\boxed{answer}`."""
    wanted = "|".join(map(re.escape, columns))
    found = re.search(rf"(?<![\w\\{{}}%]){{\s*(?:{wanted})\s*}}(?!}})", template)
    return found.group() if found else None
