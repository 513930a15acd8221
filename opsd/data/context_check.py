"""Check that the problem reaches both roles' contexts, and the solution the teacher's.

A text is first searched in the rendered template. If it is not found, since a template may trim,
escape or shorten it, the template is rendered again with a mark before each word of the text; at
least one mark has to appear.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from opsd.common.errors import UserError
from opsd.common.templates import in_single_braces, names
from opsd.data.chat import PROBE
from opsd.data.prompts import Prompts
from opsd.data.rows import Row

SHORT = 16  # a text of fewer characters may occur in a message by chance


class ContextCheck:
    """Called with each row before training. Raises UserError for the first row with missing text.

    Args:
        roles: those whose contexts a row alone determines.
        differ: require different contexts, since the teacher has the student's own weights.
        targets: prompts.target is trained on, so check it too.
    """

    def __init__(
        self, prompts: Prompts, roles: Collection[str], differ: bool = False, targets: bool = False
    ):
        self.prompts, self.roles, self.targets = prompts, roles, targets
        self.differ = differ and "teacher" in roles
        self.apart = False  # whether equal messages make different contexts
        self.controls = prompts.chats["student"].control_tokens
        self.found: dict[str, list[int]] = {}  # control token → numbers of rows that contain it
        self.by_number: list[int] = []  # rows whose answer may be a choice's number
        self.named = {name: names(template) for name, template in prompts.templates.items()}
        # A further context may be the solution alone, as Purified OPSD's (arXiv 2607.02234).
        further = {name: self.named[name] for name in prompts.section.contexts}
        self.without = {name for name, used in further.items() if used and "problem" not in used}

    def __call__(self, number: int, row: Row) -> None:
        """Check the `number`-th row, from 1."""
        if row.held:  # its like is checked
            return
        roles = [role for role in self.roles if not self.prompts.holds(row, role)]
        messages = {role: self.prompts.render(row, role) for role in roles}
        for role, message in messages.items():
            if role not in self.without and not self._arrives(row, role, message, "problem"):
                self._refuse(role, number, row, "problem")
        if (
            "solution" in self.named["teacher"] - self.named["student"]
            and "teacher" in messages
            and not self._arrives(row, "teacher", messages["teacher"], "solution")
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
        if self.differ and "teacher" in roles and (number == 1 or (alike and not self.apart)):
            context = self.prompts.context(row)
            if context.student == context.teacher:
                raise UserError(
                    f"prompts.teacher: both roles' contexts are equal in row {number} "
                    f"({row.problem[:40]!r}), so that there is nothing to teach: write "
                    "{{ solution }} or another column there, or tell the teacher more in "
                    "prompts.teacher_system"
                )
            self.apart = alike  # their contexts differ, for example by a system message

    def notes(self) -> Iterator[str]:
        """Yields notes for the user on all rows checked so far."""
        for role in ("student", "teacher"):
            template = str(self.prompts.chats[role].template)
            for name in getattr(self.prompts.section, f"{role}_chat"):
                if name not in ("chat_template", "tools") and name not in template:
                    yield (
                        f"prompts.{role}_chat has {name!r}, at which the model's chat template "
                        "does not look: it has no effect"
                    )
        if begun := self.prompts.chats["student"].unprompted:
            yield (
                "The model's chat template has no generation prompt: each rollout has to begin "
                f"with {begun!r} itself"
            )
        if rows := self.by_number:
            yield (
                f"{len(rows)} rows have choices and a number as the answer, such as row {rows[0]}: "
                "if it is a choice's place, let prompts.student number them, or map its letter"
            )
        for token, rows in self.found.items():
            yield (
                f"{len(rows)} rows hold {token!r}, such as row {rows[0]}: inside of a text too the "
                "tokenizer makes it the token by which the chat template parts turns; take it out "
                "of the data if that is not meant"
            )

    def _choices_arrive(self, number: int, row: Row, message: str) -> None:
        """Raises UserError if the answer is one of several choices that `message` does not show."""
        name, texts = given_choices(row.columns)
        answers = {*texts, *"ABCDEFGHIJ"[: len(texts)], *map(str, range(len(texts)))}
        if row.answer in answers and row.answer.isdecimal() and row.answer not in texts:
            self.by_number.append(number)
        if row.answer in answers and not all(text.strip() in message for text in texts):
            raise UserError(
                f"{self.prompts.field('student')} leaves the column {name!r} out in row {number} "
                f"({row.problem[:40]!r}), whose answer {row.answer!r} is one of its choices: write "
                f"{{{{ {name} }}}}, or a loop over it"
            )

    def _arrives(self, row: Row, role: str, message: str, what: str) -> bool:
        """Whether any word of the problem, or else of the other texts, appears in the message."""
        text = getattr(row, what).strip()
        if len(text) >= SHORT and text in message:
            return True

        def chosen(text: str) -> bool:
            other = text.strip() != row.problem.strip()
            return text.strip() != "" and other == (what == "solution")

        marked = {name: _marked(getattr(row, name), chosen) for name in (*row.texts, "columns")}
        try:
            return PROBE in self.prompts.render(replace(row, **marked), role)
        except UserError:  # the template computes with the text, and the marks break that
            return True

    def _refuse(self, role: str, number: int, row: Row, what: str) -> None:
        single = in_single_braces(self.prompts.templates[role], [what, *row.columns])
        said = f"; {single} in single braces is plain text" if single else ""
        name = single.strip("{} ") if single else what
        raise UserError(
            f"{self.prompts.field(role)} leaves the {what} out of its context in row "
            f"{number} ({row.problem[:40]!r}){said}: write {{{{ {name} }}}}"
        )


def given_choices(columns: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(the column with the choices of a multiple-choice problem, the choices); ("", []) if none.

    The column may hold a list of texts, an object of letters to texts, or `{"text": […], …}`.
    """
    for name in ("choices", "options"):
        value = columns.get(name)
        if isinstance(value, Mapping):
            value = value.get("text", [value[k] for k in value if re.fullmatch("[A-J]", str(k))])
        if isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value):
            return name, value
    return "", []


def _marked(value: Any, chosen: Callable[[str], bool]) -> Any:
    """A column's value with a mark before each word of the chosen texts, also nested ones."""
    if isinstance(value, str):
        return re.sub(r"^|\s+|$", rf"\g<0>{PROBE}", value) if chosen(value) else value
    if isinstance(value, dict):
        return {key: _marked(inside, chosen) for key, inside in value.items()}
    return [_marked(inside, chosen) for inside in value] if isinstance(value, list) else value
