"""Use the model's chat template: make a role's context, find the end of a turn, make a target.

Nothing here is specific to one template. The chat is rendered with and without an answer; the
difference is what the assistant's turn adds. A target is cut from the tokens of the whole chat, so
that it begins with the token that the model would write there.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from opsd.common.errors import UserError, in_short
from opsd.common.templates import TemplateFailure, fill_in_chat
from opsd.data import thoughts
from opsd.data.chats import THOUGHTS
from opsd.data.images import MARK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Message = dict[str, Any]

Turn = tuple[str, str | None, Sequence[Message]]
"""The arguments of `ChatTemplate.context`: the message, the system message, earlier messages."""

PROBE = "4172635180927"
"""A text that no template contains, and that no template changes by case or escapes."""


class ChatTemplate:
    """A tokenizer's chat template with one role's arguments.

    Raises UserError if there is no template, or if it leaves the user's message out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,  # the model's
        # The role's own arguments of the template, such as enable_thinking
        arguments: dict[str, Any] | None = None,
        prefill: str = "",  # text that the role's answer starts with
        # The date that the template gets as today's; None: today
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
        try:
            self.template = tokenizer.get_chat_template(other, self.arguments["tools"])
        except ValueError:  # such as "rag" and "tool_use" alone
            names = ", ".join(sorted(tokenizer.chat_template))
            raise UserError(
                f"model.path has several chat templates ({names}) and none by the name of default: "
                "add the one to use as chat_template.jinja to its directory"
            ) from None
        # Templates of multimodal models expect a list of parts. Given a string, they loop over its
        # characters, which they drop, or fail: so try both forms.
        self.in_parts, refused = False, None
        for self.in_parts in (False, True):
            try:
                if PROBE in self._render([self._message("user", PROBE)], True):
                    return
            except UserError as error:
                refused = refused if self.in_parts else error
        raise refused or UserError(
            "model.path has a chat template that leaves the user's message out, or cuts it: give "
            "it one that writes it (chat_template.jinja in the model's directory)"
        )

    def context(
        self, message: str, system: str | None = None, history: Sequence[Message] = ()
    ) -> str:
        """The text before the role's answer, including the prefill.

        history: earlier messages; their system message is used if `system` is None.
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

    def targets(self, turns: Sequence[Turn], answers: Sequence[str]) -> list[list[int]]:
        """The tokens that follow each turn's context if the assistant gives this answer.

        They are what the template writes for the answer, up to the token that ends the turn. If the
        context itself closes an empty thought, the answer's own thought is left out.
        """
        contexts = self.contexts(turns)
        texts = list(map(self._said, contexts, answers))
        chats = [self._messages(*turn) for turn in turns]
        wholes = self._rendered(
            [([*chat, self._answer(text)], False) for chat, text in zip(chats, texts, strict=True)]
        )
        tail = [self.tokenizer.eos_token_id] if self.turn_end[1] is None else []
        return [
            [*_continuation(self.tokenizer, context, self._target(whole, context, text)), *tail]
            for whole, context, text in zip(wholes, contexts, texts, strict=True)
        ]

    @cached_property
    def turn_end(self) -> tuple[str, int | None]:
        """(the text after an answer, up to the special token that ends the turn; that token's id).
        ("", None) if the template writes no such token: the tokenizer's EOS is used then.

        A turn may end with several tokens. Of these, only those belong to it that the template also
        writes before another turn: some templates write EOS only after a chat's last turn.
        """
        chat = [self._question, self._message("assistant", PROBE)]
        _, written, after = self._render(chat, False).rpartition(PROBE)
        with suppress(UserError):  # some templates write the generation prompt unasked
            opening = self._render([self._message("assistant", PROBE)], False).partition(PROBE)[0]
            after = after.removesuffix(opening.removeprefix(self.tokenizer.bos_token or ""))
        followed = ""
        with suppress(UserError):
            followed = self._render([*chat, self._question], False).rpartition(PROBE)[2]
        both = os.path.commonprefix([after, followed])  # noqa: RUF071 (of characters)
        added = self.tokenizer.added_tokens_decoder.items()
        ids = {token.content: i for i, token in added if token.content.strip()}
        special = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        found = re.compile(rf"(.*?)((?:{special})+)", re.DOTALL)
        run = found.match(both) or re.match(rf"(.*?)({special})", after, re.DOTALL)
        if not (ids and written):
            return "", None
        if run is None:
            run = re.match(rf"()({special})", followed)  # written only before another turn
            opening = self._render([self._message("user", PROBE)], False).partition(PROBE)[0]
            if after.strip() or run is None or run[2] in opening:
                return "", None
        tokens = re.findall(special, run[2])
        if self.tokenizer.eos_token in tokens:  # tokens after EOS begin the next turn
            tokens = tokens[: tokens.index(self.tokenizer.eos_token) + 1]
        return run[1] + "".join(tokens), ids[tokens[-1]]

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The special tokens that the template writes around messages, and EOS."""
        chat = [self._question, self._message("assistant", PROBE)]
        text = self._render(chat, False) + (self.tokenizer.eos_token or "")
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special and token.content.strip()}
        return frozenset(token for token in special if token in text and not thoughts.is_tag(token))

    @property
    def unprompted(self) -> str:
        """The beginning of an answer, such as "<|im_start|>assistant", if the template has no
        generation prompt, so that a rollout would have to begin with it; else ""."""
        prompt = self._render([self._question], True)
        if prompt != self._render([self._question], False):
            return ""
        chat = [self._question, self._message("assistant", PROBE)]
        begun = self._render(chat, False).partition(PROBE)[0]
        more = begun.removeprefix(prompt) if begun.startswith(prompt) else ""
        return more if any(token in more for token in self.control_tokens) else ""

    @property
    def opens_thought(self) -> bool:
        """Whether a context ends inside a thought, which the answer has to close."""
        return thoughts.open_thought(self.context(PROBE)) is not None

    @property
    def stops(self) -> frozenset[int]:
        """The id of the token that ends the assistant's turn; empty if the template has none."""
        token = self.turn_end[1]
        return frozenset() if token is None else frozenset([token])

    def _said(self, context: str, answer: str) -> str:
        """The content of the assistant's message, with the prefill, to give to the template."""
        if thoughts.without_closed_thought(context) is not None:  # such as enable_thinking: false
            return self.prefill + (thoughts.final_part(answer).lstrip() or answer)
        opened = thoughts.open_thought(self.prefill)
        if opened:  # do not open the thought twice
            answer = answer.lstrip().removeprefix(self.prefill).removeprefix(opened[0])
        return self.prefill + answer

    def _answer(self, text: str) -> Message:
        """The assistant's message, with its thought where the template expects it."""
        thought, rest = thoughts.split_thought(text)
        if not (thought.strip() and self._thought_form):
            return self._message("assistant", text)
        return self._thoughtful(thought.strip(), rest, self._thought_form)

    def _thoughtful(self, thought: str, rest: str, form: str) -> Message:
        message = self._message("assistant", rest)
        if form == "fields":
            return {**message, **dict.fromkeys(THOUGHTS, thought)}
        text = {"type": "text", "text": rest}
        return {**message, "content": [{"type": "thinking", "thinking": thought}, text]}

    @cached_property
    def _thought_form(self) -> str:
        """Where the template expects an answer's thought: "fields" of the message, "parts" of its
        content, or "" for the content's text."""
        plain = self._message("assistant", f"<think>{PROBE}</think>{PROBE[::-1]}")
        as_text = "".join(self._render([self._question, plain], False).split())
        for form in ("fields", "parts"):
            answer = self._thoughtful(PROBE, PROBE[::-1], form)
            try:
                text = "".join(self._render([self._question, answer], False).split())
            except UserError:
                continue
            # It must appear once, and not inside the printed form of a Python list.
            if re.search(rf"{PROBE}((?!{PROBE}|.type.:).)*{PROBE[::-1]}", text):
                return "" if text == as_text else form
        return ""

    @cached_property
    def _closing(self) -> str:
        """The template's text between a thought and the rest of an answer; "" if it omits them."""
        text = f"<think>\n{PROBE}\n</think>\n\n{PROBE[::-1]}"
        whole = self._render([self._question, self._answer(text)], False)
        return whole.partition(PROBE)[2].partition(PROBE[::-1])[0]

    @cached_property
    def _between(self) -> str | None:
        """The template's text between the generation prompt and an answer; None if it begins a
        finished answer differently, by more than white space."""
        question, answer = self._message("user", PROBE), self._message("assistant", PROBE[::-1])
        prompt = self._render([question], True).rpartition(PROBE)[2]
        written = self._render([question, answer], False).partition(PROBE[::-1])[0]
        begun = written.rpartition(PROBE)[2]
        if "".join(prompt.split()) != "".join(begun.split()):
            return None
        return begun.removeprefix(prompt) if begun.startswith(prompt) else ""

    def _target(self, whole: str, context: str, text: str) -> str:
        """The text after `context` in the whole chat: the answer as written, and the turn's end."""
        end = self.turn_end[0]
        thought, rest = map(str.strip, thoughts.split_thought(text))
        before = thoughts.without_closed_thought(context)
        for start in (context, before):
            if start is None or not whole.startswith(start):
                continue
            more = whole[len(start) :]
            # The end is missing if the template writes it only before another turn.
            written = more.rpartition(end)[0] if end and end in more else more.rstrip()
            if thought in written and rest in written:
                written = thoughts.split_thought(written)[1] if start == before else written
                return thoughts.without_empty_thought(written) + end
        # The template writes a finished turn differently from the generation prompt: the prompt
        # opens a thought, or the template drops the answer's. Then build the target from its parts.
        tag = thoughts.open_thought(context)
        text = text.removeprefix(self.prefill).strip()
        if tag is None:
            bare = context.removesuffix(self.prefill)
            more = bare[len(os.path.commonprefix([bare, whole])) :]  # noqa: RUF071
            if more.strip() and before is None and self._between is None:
                raise UserError(
                    f"model.path has a chat template that begins an answer with {more[-60:]!r}, "
                    "but writes no finished answer like that, so what must follow is unknown: give "
                    "it another (chat_template.jinja in the model's directory)"
                )
            return (self._between or "") + text + end
        opening, closing = tag
        if closing in text:
            return text.removeprefix(opening).removeprefix("\n") + end
        between = self._closing if closing in self._closing else f"\n{closing}\n\n"
        return thought + between + rest + end

    def _check_written(self, messages: list[Message], number: int, text: str) -> None:
        """Raises UserError if the chat's text lacks all or part of a message. Templates may trim
        and escape a message, and leave out the thought of an earlier answer."""
        role, said = messages[number]["role"], messages[number]["content"]
        parts = [{"text": said}] if isinstance(said, str) else said
        texts = [part.get("text", "").strip() for part in parts]
        if role == "assistant" or all(one in text for one in texts):
            return
        said = "".join(part.get("text", MARK) for part in parts)
        marked = self._message(role, f"{PROBE}{said}{PROBE}")
        again = self._render([*messages[:number], marked, *messages[number + 1 :]], True)
        if again.count(PROBE) < 2:
            raise UserError(
                f"model.path has a chat template that leaves the {role} message out, or cuts it "
                f"({said.strip()[:40]!r}): give it one that writes it (chat_template.jinja in the "
                "model's directory)"
            )

    @property
    def _question(self) -> Message:
        return self._message("user", "?")

    def _messages(
        self, message: str, system: str | None, history: Sequence[Message]
    ) -> list[Message]:
        if system is not None:
            others = [one for one in history if one["role"] not in ("system", "developer")]
            history = [{"role": "system", "content": system}, *others]
        before = [self._message(one["role"], one["content"]) for one in history]
        return [*before, self._message("user", message)]

    def _message(self, role: str, text: str) -> Message:
        """Make a message, with an image for each mark in the text."""
        if not self.in_parts and MARK not in text:
            return {"role": role, "content": text}
        first, *others = text.split(MARK)
        parts = [{"type": "text", "text": first}] if first or not others else []
        for one in others:
            parts += [{"type": "image"}, *([{"type": "text", "text": one}] if one else [])]
        return {"role": role, "content": parts}

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return self._rendered([(messages, add_generation_prompt)])[0]

    def _rendered(self, chats: Sequence[tuple[list[Message], bool]]) -> list[str]:
        """Renders each (messages, add_generation_prompt). Raises UserError."""
        try:
            return fill_in_chat(self.template, self.arguments, self.date, chats)
        except TemplateFailure as error:  # for example, it allows no system message
            raise UserError(f"model.path has a chat template that refuses: {error}") from None


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str | list[str]) -> Any:
    """The token ids of one or several texts. The chat template has written the special tokens: they
    are read as such, and none is added, so that BOS does not appear twice."""
    told = {"add_special_tokens": False, "split_special_tokens": False}
    try:
        return tokenizer(text, return_attention_mask=False, **told).input_ids
    except Exception as error:  # raised by tokenizers for characters that its model lacks
        said = f"model.path has a tokenizer that fails on a text: {in_short(error)}"
        raise UserError(said) from None


def _continuation(tokenizer: PreTrainedTokenizerBase, context: str, target: str) -> list[int]:
    """The token ids of `target` after `context`, as in the tokenised whole. Raises UserError."""

    ids = partial(token_ids, tokenizer)
    first, whole = ids(context), ids(context + target)
    if whole[: len(first)] == first:
        return whole[len(first) :]
    # A token of the whole text spans the border. A rollout has no such token, for it follows the
    # context's own tokens: so tokenise the target alone. SentencePiece adds a space before a text's
    # first word: so put an anchor first.
    wanted = tokenizer.decode(whole)
    for anchor in ("\n", ".", "a", ""):
        start, found = ids(anchor), ids(anchor + target)
        rest = found[len(start) :]
        if found[: len(start)] == start and tokenizer.decode([*first, *rest]) == wanted:
            return rest
    raise UserError(
        "model.path has a tokenizer that makes one token of a context's end and an answer's "
        f"beginning, in {(context[-20:] + target[:20])!r}: change the prompt's end"
    )
