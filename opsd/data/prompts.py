"""Dataset rows → the student's and the teacher's contexts, as token ids.

Both roles see a user message made from a Jinja template over the row's columns, put through the
model's own chat template. A rollout's tokens are appended to both contexts as ids: nothing is ever
decoded and tokenised again.

The teacher's template may also use `rollout`, which the teacher is to score, and `peers`, the
problem's other rollouts. It is then filled in for each rollout; if empty, nothing is taught. With
`prompts.majority` so is one that uses `solution` or `answer`, which a row may lack.

A template shows a row's images where it says `images`; ours show them first. A context with images
is made anew at each use, by the model's processor (`tokenizer.images`).
"""

from __future__ import annotations

import datetime
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from opsd.common.errors import UserError
from opsd.common.templates import (
    ROLLOUT_NAMES,
    SOLUTION_NAMES,
    TemplateFailure,
    check_template,
    fill_in,
    names,
)
from opsd.config.sections import STUDENT_TEMPLATE, TEACHER_TEMPLATE, PromptsSection
from opsd.data.chat import ChatTemplate, token_ids
from opsd.data.images import MARK, UnreadableImageError
from opsd.data.rows import Row
from opsd.data.token_bound import token_bound

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BATCH = 256
"""Texts that are tokenised at once."""

KEPT_TOKENS = 1 << 26
"""Tokens of rows that are remembered: 256 MiB. What comes later is tokenised at each use."""

MESSAGE = "\u2042the message\u2042"
"""A message whose place in a chat template's text is looked for."""

ESCAPED_MESSAGE = MESSAGE + "\\\"'<&>\n\tA"
"""The same, with characters that a template may escape."""


IMAGES = "{{ images }}"
"""What our own templates begin with where rows have images."""


class UnreadableRowError(UserError):
    """A row's text has a token that the model, or its teacher, cannot be given."""

    def __init__(self, row: Row, message: str):
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Context:
    """One problem as each role sees it: token ids that end where the solution is to begin.

    A teacher's is None where it is made of rollouts. others: by their names in prompts.contexts.
    """

    student: list[int]
    teacher: list[int] | None
    others: Mapping[str, list[int] | None] = field(default_factory=dict)

    def of(self, role: str) -> list[int] | None:
        """The context of one role."""
        return self.others[role] if role in self.others else getattr(self, role)


class Prompts:
    """Renders and tokenises rows for one tokenizer, each row once a role.

    A row's ids are remembered under the row object itself, not under what it says.

    Raises UserError for templates that cannot work.
    """

    def __init__(self, section: PromptsSection, tokenizer: PreTrainedTokenizerBase):
        self.section, self.tokenizer = section, tokenizer
        date = None if section.date is None else datetime.date.fromisoformat(section.date)
        self.chats = {
            role: ChatTemplate(
                tokenizer,
                getattr(section, f"{role}_chat"),
                getattr(section, f"{role}_prefill"),
                date,
            )
            for role in ("student", "teacher")
        }
        self.chats |= dict.fromkeys(section.contexts, self.chats["teacher"])
        own = {name: getattr(section, name) for name in ("student", "teacher", "target")}
        self.templates = own | section.contexts
        self.images = getattr(tokenizer, "images", None)
        self.shows = self._with_images() if self.images is not None else frozenset()
        teachers = ("teacher", *section.contexts)
        late = ROLLOUT_NAMES | (frozenset() if section.majority is None else SOLUTION_NAMES)
        self.over_rollouts = [r for r in teachers if names(self.templates[r]) & late]
        # What a row needs so as not to need a majority.
        shown = (names(self.templates[role]) for role in self.over_rollouts)
        self._solution = SOLUTION_NAMES & late & frozenset().union(*shown)
        for name, template in self.templates.items():
            check_template(self.field(name), template)
        # By role and the row's id(); the row beside its ids, so that no other row gets its id().
        self._known: dict[tuple[str, int], tuple[Row, array]] = {}
        self._known_tokens = 0
        # By template and id(), the last call's rows beside their texts.
        self._rendered: dict[str, dict[int, tuple[Row, str]]] = {}
        self._bound = token_bound(tokenizer)
        self._without_row = tokens_without_row(tokenizer)
        self._teachers_alone = getattr(tokenizer, "teachers_tokens", ())
        self._chat_sizes: dict[str, tuple[int, int] | None] = {}

    def _with_images(self) -> frozenset[str]:
        """The roles that are shown images, by our own templates before the rest."""
        for name, ours in (("student", STUDENT_TEMPLATE), ("teacher", TEACHER_TEMPLATE)):
            if self.templates[name] == ours:
                self.templates[name] = IMAGES + ours
        found = frozenset(name for name, text in self.templates.items() if "images" in names(text))
        if not found or "target" in found:
            said = "is shown images, and an answer has none" if found else "no template shows them"
            field = "prompts.target" if found else "columns.images"
            raise UserError(f"{field}: {said}; write {IMAGES} in prompts.student, say")
        return found

    def context(self, row: Row) -> Context:
        """The ids of both roles' contexts for this row."""
        return self.contexts([row])[0]

    @property
    def may_be_unreadable(self) -> bool:
        """Whether there are tokens that no text may have."""
        return bool(self._without_row or self._teachers_alone)

    def field(self, name: str) -> str:
        """How a config names a template."""
        return f"prompts.contexts.{name}" if name in self.section.contexts else f"prompts.{name}"

    def contexts(self, rows: Sequence[Row]) -> list[Context]:
        """The ids of all roles' contexts for each row."""
        none = [None] * len(rows)
        ids = {
            role: none if role in self.over_rollouts else self.all_ids(rows, role)
            for role in self.chats
        }
        students, teachers = ids.pop("student"), ids.pop("teacher")
        return [
            Context(student, teachers[n], {role: each[n] for role, each in ids.items()})
            for n, student in enumerate(students)
        ]

    def ids(self, row: Row, role: str) -> list[int]:
        """The ids of one role's context."""
        return self.all_ids([row], role)[0]

    def all_ids(self, rows: Sequence[Row], role: str) -> list[list[int]]:
        """The ids of one role's context for each row; `ImageIds` where it shows images."""
        seen = [bool(row.images) and role in self.shows for row in rows]
        plain = [row for row, sees in zip(rows, seen, strict=True) if not sees]
        known = (ids.tolist() for ids in self._tokenised(plain, role))
        return [
            self._checked(row, self._made([row], role, "")[0]) if sees else next(known)
            for row, sees in zip(rows, seen, strict=True)
        ]

    def target(self, row: Row, role: str = "student") -> list[int]:
        """The ids of `prompts.target` as the assistant's turn after a role's context."""
        return self.all_ids([row], f"{role} target")[0]

    def lengths(self, rows: Sequence[Row], role: str) -> list[int]:
        """How many ids each row has in a role; "student target": of what follows its context."""
        return [len(ids) for ids in self._tokenised(rows, role)]

    def longest(self, rows: Sequence[Row], role: str) -> list[int | None]:
        """No fewer than `ids` of each row has, found without tokenising; None where nothing can be
        said.

        The chat template is taken to copy the message and to add constants of its own. Raises
        UserError where a row cannot be rendered.
        """
        role, _, target = role.partition(" ")
        messages = self.rendered(rows, "target" if target else role)
        if self._bound is not None and role not in self._chat_sizes:
            self._chat_sizes[role] = self._chat_size(role)
        if (chat := self._chat_sizes.get(role)) is None:
            return [None] * len(rows)
        sizes = [chat[0] * self._bound(message) + chat[1] for message in messages]
        return [
            None
            if row.history or MARK in message or any(map(message.__contains__, self._without_row))
            else size
            for row, message, size in zip(rows, messages, sizes, strict=True)
        ]

    def _chat_size(self, role: str) -> tuple[int, int] | None:
        """How often a role's chat template writes the message, and the most tokens beside it.

        What a template adds for one message and not for another are constants in it, so its own
        size is added for each message. None where the message is not written as it is.
        """
        text = self._text(MESSAGE, role)
        copies = text.count(MESSAGE)
        if any(map(text.__contains__, self._without_row)):
            return None
        if copies == 0 or self._text(ESCAPED_MESSAGE, role).count(ESCAPED_MESSAGE) != copies:
            return None
        more = text.replace(MESSAGE, "") + 2 * str(self.tokenizer.chat_template)
        return copies, self._bound(more)

    def _tokenised(self, rows: Sequence[Row], role: str) -> Iterator[array]:
        """Each row's ids, in order; those that are not known yet are tokenised in batches."""
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            new = {id(row): row for row in batch if (role, id(row)) not in self._known}
            made = dict(zip(new, self._tokenise(list(new.values()), role), strict=True))
            for row in batch:
                ids = made.get(id(row))
                yield self._known[role, id(row)][1] if ids is None else ids

    def _tokenise(self, rows: Sequence[Row], role: str) -> list[array]:
        if not rows:
            return []
        given = self._made(rows, *role.partition(" ")[::2])
        pairs = zip(rows, given, strict=True)
        made = [array("i", self._checked(row, ids)) for row, ids in pairs]
        for row, ids in zip(rows, made, strict=True):
            if self._known_tokens + len(ids) <= KEPT_TOKENS:
                self._known[role, id(row)] = row, ids
                self._known_tokens += len(ids)
        return made

    def _made(self, rows: Sequence[Row], role: str, target: str) -> list[list[int]]:
        system, messages = self._system(role), self.rendered(rows, role)
        turns = [(text, system, row.history) for text, row in zip(messages, rows, strict=True)]
        if not target:
            return self._read(rows, messages, self.chats[role].contexts(turns))
        made = self.chats[role].targets(turns, self.rendered(rows, "target"))
        for row, ids in zip(rows, made, strict=True):
            if self.images is not None and self.images.token_id in ids:
                raise UnreadableRowError(row, f"its target has {self.images.token!r}")
        return made

    def _ids(self, texts: list[str]) -> list[list[int]]:
        made = token_ids(self.tokenizer, texts)
        if not all(made):
            text = texts[made.index([])]
            raise UserError(f"model.path has a tokenizer that makes no token of {text[:60]!r}")
        return made

    def _read(
        self, rows: Sequence[Row], messages: Sequence[str], texts: list[str]
    ) -> list[list[int]]:
        """The ids of each row's context, in whose message MARK stood for an image."""
        made = self._ids(texts)
        if self.images is None:
            return made
        shown = [message.count(MARK) for message in messages]
        return [self._seen(*each) for each in zip(rows, shown, texts, made, strict=True)]

    def _seen(self, row: Row, shown: int, text: str, ids: list[int]) -> list[int]:
        written = text.count(self.images.token)
        if shown not in (0, len(row.images)) or written != shown:
            raise UnreadableRowError(
                row,
                f"its context has {self.images.token!r} {written} times where {shown} of its "
                f"{len(row.images)} images are shown: all of them are, once, or none",
            )
        try:
            return self.images.context(text, row.images) if shown else ids
        except UnreadableImageError as error:
            raise UnreadableRowError(row, f"one of its images {error}") from None
        except ValueError as error:  # such as one that is a line
            said = f"the model's processor refuses an image of it: {error}"
            raise UnreadableRowError(row, said) from None

    def ending(self, role: str) -> str:
        """What stands between one role's message and its answer: the generation prompt, with what
        it says of thinking, and the prefill."""
        return self._text(MESSAGE, role).rpartition(MESSAGE)[2]

    def different_endings(self) -> str | None:
        """What to tell where the two roles begin their answers differently, as with
        enable_thinking for one of them; None where they begin alike."""
        student, teacher = self.ending("student"), self.ending("teacher")
        if student == teacher:
            return None
        return (
            f"The student's answer begins after {student!r}, the teacher's after {teacher!r}: the "
            "teacher judges a rollout's first token as its own beginning (prompts.teacher_prefill "
            "can open what it would open first)"
        )

    def unsolved(self, row: Row) -> bool:
        """Whether a row lacks a text for which its rollouts' majority is to stand."""
        return not all(row.texts[name].strip() for name in self._solution)

    def solved(self, row: Row, answer: str) -> Row:
        """The row with its rollouts' majority in the place of what it lacks."""
        return replace(
            row,
            solution=row.solution or f"\\boxed{{{answer}}}",
            answer=row.answer or answer,
        )

    def teacher_of(
        self, row: Row, rollout: Any, peers: Sequence[Any], role: str = "teacher"
    ) -> list[int] | None:
        """The ids of a teacher's context for one rollout; None where its message is empty."""
        for name in ROLLOUT_NAMES & row.columns.keys() & names(self.templates[role]):
            raise UserError(
                f"{self.field(role)} uses {name!r}, which is a column of the data too: rename the "
                f"column; in the template {name!r} means rollouts"
            )
        message = self.render(row, role, rollout=rollout, peers=list(peers))
        if not message.strip():
            return None
        text = self._text(message, role, row)
        return self._checked(row, self._read([row], [message], [text])[0])

    def _checked(self, row: Row, ids: list[int]) -> list[int]:
        if self._without_row and (bad := set(self._without_row.values()).intersection(ids)):
            token = self.tokenizer.convert_ids_to_tokens(min(bad))
            raise UnreadableRowError(
                row,
                f"its text has {token!r}, token {min(bad)}, for which the model has no embedding "
                f"({self.tokenizer.embedding_rows} rows)",
            )
        return ids

    def _text(self, message: str, role: str, row: Row | None = None) -> str:
        """A role's whole context as text: the chat template around the message, and the prefill."""
        history = () if row is None else row.history
        return self.chats[role].context(message, self._system(role), history)

    def _system(self, role: str) -> str | None:
        own = getattr(self.section, f"{'student' if role == 'student' else 'teacher'}_system")
        return self.section.system if own is None else own

    def render(self, row: Row, name: str, **more: Any) -> str:
        """The filled-in template of that name; `more`: what it may use beside the columns."""
        return self.rendered([row], name, **more)[0]

    def rendered(self, rows: Sequence[Row], name: str, **more: Any) -> list[str]:
        """`render` of each row. Those of the last call for several are remembered."""
        known = {} if more else self._rendered.get(name, {})
        template = self.templates[name]
        used, new = names(template), [row for row in rows if id(row) not in known]
        if not new:
            return [known[id(row)][1] for row in rows]
        values = [{**row.columns, **row.texts, **more} for row in new]
        if self.images is not None:
            for row, its in zip(new, values, strict=True):
                its["images"] = MARK * len(row.images)
        try:
            made = fill_in(template, [{k: one[k] for k in used & one.keys()} for one in values])
        except TemplateFailure as error:
            said = f"cannot be filled in: {error}; columns: {', '.join(sorted(values[0]))}"
            raise UserError(f"{self.field(name)} {said}") from None
        for token in self._teachers_alone:
            for row, text in zip(new, made, strict=True):
                if token in text:
                    raise UnreadableRowError(
                        row, f"its text has {token!r}, which is a token of the teacher's alone"
                    )
        texts = known | {id(row): (row, text) for row, text in zip(new, made, strict=True)}
        if not more and len(rows) > 1:
            self._rendered[name] = {id(row): texts[id(row)] for row in rows}
        return [texts[id(row)][1] for row in rows]


def tokens_without_row(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens for which the model's embedding has no row, as the image token of Gemma 3 1B."""
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is None or max([len(tokenizer) - 1, *tokenizer.added_tokens_decoder]) < rows:
        return {}
    return {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
