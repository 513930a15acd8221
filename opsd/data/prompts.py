"""Render dataset rows as the student's and the teacher's contexts, and tokenise them.

Both roles see a user message, rendered by a Jinja template from the row's columns, inside of the
model's own chat template. A rollout's tokens are appended to both contexts as ids: nothing is ever
decoded and tokenised again.

The teacher's template may also use `rollout`, which the teacher is to score, and `peers`, the
problem's other rollouts. It is then rendered for each rollout; if it is empty, nothing is trained.
With `prompts.majority` this also holds for one that uses `solution` or `answer`: a row may lack it.
With `prompts.hold` the teacher's context of a row that lacks it is the student's.

A template shows a row's images by the variable `images`; our templates show them first. A context
with images is not cached: the model's processor (`tokenizer.images`) makes it at each use.
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
    check_template,
    fill_in_columns,
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
"""The number of texts to tokenise at once."""

KEPT_TOKENS = 1 << 26
"""The most tokens to cache, 256 MiB; further rows are tokenised at each use."""

MESSAGE = "\u2042the message\u2042"
"""A message for finding out where a chat template writes the message."""

ESCAPED_MESSAGE = MESSAGE + "\\\"'<&>\n\tA"
"""The same message, with characters that a template may escape."""

IMAGES = "{{ images }}"
"""The beginning of our own templates if rows have images."""


class UnreadableRowError(UserError):
    """A row's text has a token that the student's or the teacher's vocabulary lacks."""

    def __init__(self, row: Row, message: str):
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Context:
    """A problem's context for each role: token ids that end where the answer begins.

    A teacher's is None if its template uses rollouts. others: name in prompts.contexts → ids.
    """

    student: list[int]
    teacher: list[int] | None
    others: Mapping[str, list[int] | None] = field(default_factory=dict)

    def of(self, role: str) -> list[int] | None:
        """The context of a role: student, teacher or a name in prompts.contexts."""
        return self.others[role] if role in self.others else getattr(self, role)


class Prompts:
    """Renders and tokenises rows for one tokenizer, each row once per role.

    Caches a row's ids by the row object's identity, not by its content.

    Raises UserError for invalid templates.
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
        # The texts without which a row needs a majority.
        shown = (names(self.templates[role]) for role in self.over_rollouts)
        self._solution = SOLUTION_NAMES & late & frozenset().union(*shown)
        # For each of a teacher's roles, the texts without which a row is held.
        self._needed = {r: SOLUTION_NAMES & names(self.templates[r]) for r in teachers}
        for name, template in self.templates.items():
            check_template(self.field(name), template)
        # (role, id(row)) → (row, ids); holding the row keeps its id() from being used again.
        self._known: dict[tuple[str, int], tuple[Row, array]] = {}
        self._known_tokens = 0
        # Template's name → {id(row): (row, text)} of the last call.
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
            said = "shows images, and an answer has none" if found else "no template shows them"
            field = "prompts.target" if found else "columns.images"
            raise UserError(f"{field}: {said}; write {IMAGES} in prompts.student")
        return found

    def context(self, row: Row) -> Context:
        """The ids of all roles' contexts for this row."""
        return self.contexts([row])[0]

    @property
    def may_be_unreadable(self) -> bool:
        """Whether there are tokens that no row's text may contain."""
        return bool(self._without_row or self._teachers_alone)

    def field(self, name: str) -> str:
        """The config field of a template."""
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
        """The ids of one role's context for each row; `ImageIds` if it shows images."""
        own = ["student" if self.holds(row, role) else role for row in rows]
        seen = [bool(row.images) and its in self.shows for row, its in zip(rows, own, strict=True)]
        plain = [row for row, sees in zip(rows, seen, strict=True) if not sees]
        known = (ids.tolist() for ids in self._tokenised(plain, role))
        return [
            self._checked(row, self._made([row], its, "")[0]) if sees else next(known)
            for row, its, sees in zip(rows, own, seen, strict=True)
        ]

    def target(self, row: Row, role: str = "student") -> list[int]:
        """The ids of `prompts.target` as the assistant's turn after a role's context."""
        return self.all_ids([row], f"{role} target")[0]

    def lengths(self, rows: Sequence[Row], role: str) -> list[int]:
        """The number of ids of each row's context; role "student target": of its target."""
        return [len(ids) for ids in self._tokenised(rows, role)]

    def longest(self, rows: Sequence[Row], role: str) -> list[int | None]:
        """An upper bound on `lengths`, found without tokenising; None for a row without a bound.

        It assumes that the chat template copies the message and adds constants. Raises UserError
        if a row cannot be rendered.
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
        """(how often a role's chat template writes the message, the most tokens that it adds).

        What a template adds for some messages only are constants in it, so the bound includes the
        template's own size. None if the template changes the message.
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
        """Yields each row's ids, in order; tokenises rows that are not cached in batches."""
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            held = {id(row) for row in batch if self.holds(row, role)}
            made: dict[int, array] = {}
            for own in (role, "student") if held else (role,):
                some = [row for row in batch if (id(row) in held) == (own != role)]
                new = {id(row): row for row in some if (own, id(row)) not in self._known}
                made |= zip(new, self._tokenise(list(new.values()), own), strict=True)
            for row in batch:
                ids, own = made.get(id(row)), "student" if id(row) in held else role
                yield self._known[own, id(row)][1] if ids is None else ids

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
                f"its context has {self.images.token!r} {written} times, for {shown} of its "
                f"{len(row.images)} images: it must show each image once, or none",
            )
        try:
            return self.images.context(text, row.images) if shown else ids
        except UnreadableImageError as error:
            raise UnreadableRowError(row, f"one of its images {error}") from None
        except ValueError as error:  # such as one that is a line
            said = f"the model's processor refuses an image of it: {error}"
            raise UnreadableRowError(row, said) from None

    def ending(self, role: str) -> str:
        """The text between a role's message and its answer: the generation prompt, which may open
        or close a thought, and the prefill."""
        return self._text(MESSAGE, role).rpartition(MESSAGE)[2]

    def different_endings(self) -> str | None:
        """A note if the roles' contexts end differently, as with enable_thinking for only one of
        them; None if they end alike."""
        student, teacher = self.ending("student"), self.ending("teacher")
        if student == teacher:
            return None
        return (
            f"The student's answer begins after {student!r}, the teacher's after {teacher!r}: the "
            "teacher judges a rollout's first token as its own beginning (prompts.teacher_prefill "
            "can open what it would open first)"
        )

    def unsolved(self, row: Row) -> bool:
        """Whether a row lacks a text that its rollouts' majority answer has to replace."""
        return not all(row.texts[name].strip() for name in self._solution)

    def holds(self, row: Row, role: str) -> bool:
        """Whether this role is shown what the student sees: under `prompts.hold` for want of a
        solution, or because the row is a variation of another."""
        needed = self._needed.get(role, ()) if self.section.hold or row.held else ()
        return not all(row.texts[name].strip() for name in needed)

    def solved(self, row: Row, answer: str) -> Row:
        """A copy of the row with the rollouts' majority answer for each text that it lacks."""
        return replace(
            row, solution=row.solution or f"\\boxed{{{answer}}}", answer=row.answer or answer
        )

    def teacher_of(
        self, row: Row, rollout: Any, peers: Sequence[Any], role: str = "teacher"
    ) -> list[int] | None:
        """The ids of a teacher's context for one rollout; None if its message is empty."""
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
        """A role's whole context as text: the chat template with the message, and the prefill."""
        history = () if row is None else row.history
        return self.chats[role].context(message, self._system(role), history)

    def _system(self, role: str) -> str | None:
        own = getattr(self.section, f"{'student' if role == 'student' else 'teacher'}_system")
        return self.section.system if own is None else own

    def render(self, row: Row, name: str, **more: Any) -> str:
        """Render the template `name` for a row; more: variables in addition to the columns."""
        return self.rendered([row], name, **more)[0]

    def rendered(self, rows: Sequence[Row], name: str, **more: Any) -> list[str]:
        """Render the template for each row; caches the texts of the last call for several rows."""
        if not more and (held := [row for row in rows if self.holds(row, name)]):
            rest = [row for row in rows if not self.holds(row, name)]
            text_of = dict(zip(map(id, held), self.rendered(held, "student"), strict=True))
            text_of |= zip(map(id, rest), self.rendered(rest, name), strict=True)
            return [text_of[id(row)] for row in rows]
        known = {} if more else self._rendered.get(name, {})
        new = [row for row in rows if id(row) not in known]
        if not new:
            return [known[id(row)][1] for row in rows]
        values = [{**row.columns, **row.texts, **more} for row in new]
        if self.images is not None:
            for row, its in zip(new, values, strict=True):
                its["images"] = MARK * len(row.images)
        made = fill_in_columns(self.field(name), self.templates[name], values)
        for token in self._teachers_alone:
            for row, text in zip(new, made, strict=True):
                if token in text:
                    raise UnreadableRowError(
                        row,
                        f"its text has {token!r}, a token that only the teacher's tokenizer has",
                    )
        texts = known | {id(row): (row, text) for row, text in zip(new, made, strict=True)}
        if not more and len(rows) > 1:
            self._rendered[name] = {id(row): texts[id(row)] for row in rows}
        return [texts[id(row)][1] for row in rows]


def tokens_without_row(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens without a row in the model's embedding, such as Gemma 3 1B's image token: → ids."""
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is None:
        return {}
    return {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
