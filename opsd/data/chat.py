"""The model's chat template: what one role's context is, where its turn ends, what a target is.

Nothing here is built by hand. The chat is rendered with and without an answer, and what stands
between the two is what the assistant's turn adds. A target is cut from the tokens of the whole
chat, so that it begins with the token that the model would write there.
"""

import datetime
import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd.common.errors import UserError
from opsd.common.templates import TemplateFailure, fill_in_chat

Message = dict[str, Any]

Turn = tuple[str, str | None, Sequence[Message]]
"""The arguments of `ChatTemplate.context`: a message, the system's, the messages before."""

PROBE = "4172635180927"
"""A text that no template writes by itself, and none changes by its case or its escapes."""

_CLOSED_THOUGHT = re.compile(
    r"(</[a-z_:]{0,30}think[a-z_]{0,30}>|\[/THINK\]|<channel\|>)\s*$", re.IGNORECASE
)
_OPEN_TAG = re.compile(r"<([a-z_:]{0,30}think[a-z_]{0,30})>|\[(THINK)\]", re.IGNORECASE)


class ChatTemplate:
    """A tokenizer's chat template, as one role uses it.

    Raises UserError where there is no template, or it leaves the message out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,  # the model's
        # The role's own arguments of the template, such as enable_thinking
        arguments: dict[str, Any] | None = None,
        prefill: str = "",  # text that the role's answer starts with
        # What the template is told when it asks for today's date; None: today
        date: datetime.date | None = None,
    ):
        if not tokenizer.chat_template:
            raise UserError(
                "model.path has a tokenizer without a chat template: use an instruction-tuned "
                "model, or add a chat_template.jinja to its directory"
            )
        self.tokenizer, self.prefill, self.date = tokenizer, prefill, date or datetime.date.today()
        self.arguments = {**tokenizer.special_tokens_map, "tools": None, **(arguments or {})}
        other = self.arguments.pop("chat_template", None)
        self.template = tokenizer.get_chat_template(other, self.arguments["tools"])
        # Templates of multimodal models walk over a list of parts, and over the characters of a
        # plain string, which they drop, or of which they ask what a string has not.
        self.in_parts, refused = False, None
        for self.in_parts in (False, True):
            try:
                if PROBE in self._render([self._message("user", PROBE)], True):
                    return
            except UserError as error:
                refused = refused or error
        raise refused or UserError(
            "model.path has a chat template that leaves the user's message out: give it one that "
            "writes it (chat_template.jinja in the model's directory)"
        )

    def context(
        self, message: str, system: str | None = None, history: Sequence[Message] = ()
    ) -> str:
        """The text that the role's answer follows, with its prefill.

        history: messages before this one; its system message stands where `system` is None.
        """
        return self.contexts([(message, system, history)])[0]

    def contexts(self, turns: Sequence[Turn]) -> list[str]:
        """The `context` of each turn."""
        chats = [self._messages(*turn) for turn in turns]
        texts = self._rendered([(messages, True) for messages in chats])
        for messages, text in zip(chats, texts, strict=True):
            for number in range(len(messages)):
                self._check_written(messages, number, text)
        return [text + self.prefill for text in texts]

    def context_ids(
        self, message: str, system: str | None = None, history: Sequence[Message] = ()
    ) -> list[int]:
        """The tokens of `context`."""
        return self.ids(self.context(message, system, history))

    def ids(self, text: str) -> list[int]:
        """The tokens of a rendered chat, which holds its special tokens already."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def target_ids(
        self,
        message: str,
        answer: str,
        system: str | None = None,
        history: Sequence[Message] = (),
    ) -> list[int]:
        """The tokens that follow `context_ids` where the assistant answers with `answer`.

        They are what the template writes for that turn, up to the token that ends it. Where the
        context closes an empty thought itself, the answer's own thought is left out.
        """
        return self.targets([(message, system, history)], [answer])[0]

    def targets(self, turns: Sequence[Turn], answers: Sequence[str]) -> list[list[int]]:
        """The `target_ids` of each turn and its answer."""
        contexts = self.contexts(turns)
        said = [
            answer.rpartition(closed.group().strip())[2].lstrip("\n")
            if (closed := _CLOSED_THOUGHT.search(context))  # such as enable_thinking: false
            else answer
            for context, answer in zip(contexts, answers, strict=True)
        ]
        wholes = self._rendered(
            [
                ([*self._messages(*turn), self._message("assistant", self.prefill + answer)], False)
                for turn, answer in zip(turns, said, strict=True)
            ]
        )
        tail = [self.tokenizer.eos_token_id] if self.turn_end[1] is None else []
        return [
            [*_continuation(self.tokenizer, context, self._target(whole, context, answer)), *tail]
            for whole, context, answer in zip(wholes, contexts, said, strict=True)
        ]

    @cached_property
    def turn_end(self) -> tuple[str, int | None]:
        """What the template writes after an answer, up to the special token that ends the turn, and
        that token; ("", None) where it writes none, and the tokenizer's EOS has to do.

        A turn may end with several tokens in a row. Those belong to it that the template writes
        before another turn too: some write EOS after a chat's last turn alone.
        """
        chat = [self._message("user", "?"), self._message("assistant", PROBE)]
        _, written, after = self._render(chat, False).rpartition(PROBE)
        try:
            followed = self._render([*chat, self._message("user", "?")], False).rpartition(PROBE)[2]
        except UserError:
            followed = ""
        both = os.path.commonprefix([after, followed])  # noqa: RUF071 (of characters)
        added = self.tokenizer.added_tokens_decoder.items()
        ids = {token.content: i for i, token in added if token.content.strip()}
        special = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        found = re.compile(rf"(.*?)((?:{special})+)", re.DOTALL)
        run = found.match(both) or re.match(rf"(.*?)({special})", after, re.DOTALL)
        if not (ids and written and run):
            return "", None
        return run[0], ids[re.findall(special, run[2])[-1]]

    @property
    def opens_thought(self) -> bool:
        """Whether a context ends inside a thought, which the answer is to close."""
        return open_thought(self.context(PROBE)) is not None

    @property
    def stops(self) -> frozenset[int]:
        """The token that ends the assistant's turn; empty where the template writes none."""
        token = self.turn_end[1]
        return frozenset() if token is None else frozenset([token])

    def _target(self, whole: str, context: str, answer: str) -> str:
        """What follows `context` in the whole chat: the answer as the template writes it, and its
        end."""
        end = self.turn_end[0]
        if whole.startswith(context):
            written, closed, _ = (
                whole[len(context) :].rpartition(end)
                if end
                else (whole[len(context) :].rstrip(), "", "")
            )
            if (closed or not end) and answer.strip() in written:
                return written + end
        # The generation prompt is not how the template writes the turn afterwards: it opens a
        # thought, or the template drops the answer's. The target follows what was opened.
        answer = answer.strip()
        tag = open_thought(context)
        if tag is None:
            bare = context.removesuffix(self.prefill)
            more = bare[len(os.path.commonprefix([bare, whole])) :]  # noqa: RUF071
            if more.strip() and not _CLOSED_THOUGHT.search(bare):
                raise UserError(
                    f"model.path has a chat template that begins an answer with {more[-60:]!r}, "
                    "and writes no finished answer so: what is to follow it cannot be told; give "
                    "it another (chat_template.jinja in the model's directory)"
                )
            return answer + end
        opening, closing = tag
        answer = answer.removeprefix(opening).removeprefix("\n")
        if closing not in answer:
            answer = f"\n{closing}\n\n{answer}"
        return answer + end

    def _check_written(self, messages: list[Message], number: int, text: str) -> None:
        """Raises UserError where a chat's text lacks a message, or a part of it. Templates may
        trim and escape it, and leave the thought of an earlier answer out."""
        role, said = messages[number]["role"], messages[number]["content"]
        said = said if isinstance(said, str) else said[0]["text"]
        if not said.strip() or said.strip() in text or role == "assistant":
            return
        marked = self._message(role, f"{PROBE}{said}{PROBE}")
        again = self._render([*messages[:number], marked, *messages[number + 1 :]], True)
        if again.count(PROBE) < 2:
            raise UserError(
                f"model.path has a chat template that leaves the {role} message out, or cuts it "
                f"({said.strip()[:40]!r}): give it one that writes it (chat_template.jinja in the "
                "model's directory)"
            )

    def _messages(
        self, message: str, system: str | None, history: Sequence[Message]
    ) -> list[Message]:
        if system is not None:
            history = [{"role": "system", "content": system}, *without_system(history)]
        before = [self._message(one["role"], one["content"]) for one in history]
        return [*before, self._message("user", message)]

    def _message(self, role: str, text: str) -> Message:
        return {
            "role": role,
            "content": [{"type": "text", "text": text}] if self.in_parts else text,
        }

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return self._rendered([(messages, add_generation_prompt)])[0]

    def _rendered(self, chats: Sequence[tuple[list[Message], bool]]) -> list[str]:
        """The text of each (messages, add_generation_prompt)."""
        try:
            return fill_in_chat(self.template, self.arguments, self.date, chats)
        except TemplateFailure as error:  # such as one that takes no system message
            raise UserError(f"model.path has a chat template that refuses: {error}") from None


def without_system(history: Sequence[Message]) -> list[Message]:
    """The messages that no system wrote."""
    return [message for message in history if message["role"] not in ("system", "developer")]


def open_thought(text: str) -> tuple[str, str] | None:
    """The tags of the thought that `text` leaves open, as ("<think>", "</think>"); None: none.

    >>> open_thought("<|im_start|>assistant\\n<think>\\n")
    ('<think>', '</think>')
    >>> open_thought("<think>\\n\\n</think>\\n\\n") is None
    True
    """
    tags = list(_OPEN_TAG.finditer(text))
    if not tags:
        return None
    opening = tags[-1].group()
    closing = f"{opening[0]}/{opening[1:]}"
    # Only what the text ends with counts: a problem may talk about such tags.
    rest = text[tags[-1].end() :]
    return None if rest.strip() else (opening, closing)


def _continuation(tokenizer: PreTrainedTokenizerBase, context: str, target: str) -> list[int]:
    """The tokens of `target` after those of `context`, as they are in the whole text."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    first, whole = ids(context), ids(context + target)
    if whole[: len(first)] == first:
        return whole[len(first) :]
    # A token of the whole text reaches over the border, which a rollout never has: it follows the
    # context's own tokens. SentencePiece's puts a space before a text's first word: an anchor
    # stands there instead.
    wanted = tokenizer.decode(whole)
    for anchor in ("\n", ".", "a", ""):
        start, found = ids(anchor), ids(anchor + target)
        rest = found[len(start) :]
        if found[: len(start)] == start and tokenizer.decode([*first, *rest]) == wanted:
            return rest
    raise UserError(
        "model.path has a tokenizer that joins a context's last characters and an answer's first: "
        f"{(context[-20:] + target[:20])!r} cannot be split there; change the prompt's end"
    )
