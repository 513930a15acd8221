"""Read chats from a dataset's rows: lists of messages, as in instruction data.

The last user message is the problem, and the assistant's last message is the solution. The messages
before that problem, a system message or earlier turns, are the row's history.
"""

import ast
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

ROLES = {"human": "user", "prompter": "user"}
ROLES |= dict.fromkeys(("gpt", "model", "bot", "chatgpt", "bard", "bing"), "assistant")
"""Names of roles elsewhere, such as in ShareGPT → ours."""

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns with a whole chat; `prompt` and `completion` have a chat's two halves."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that may hold its thought, separate from its content."""

TEXTS = frozenset({"text", "input_text", "output_text"})
TOOLS = frozenset({"tool", "function", "function_call", "observation", "ipython"})

NO_COLUMN = " (map the column of a row's images: columns.images=images)"
NOT_FIRST = " after a text (a prompt shows a row's images where its template has {{ images }})"


class NotTextError(ValueError):
    """A chat has content other than text; the error's message completes "its chat …"."""


class Chat(NamedTuple):
    """A chat's problem, its solution ("" without one), the messages before the problem, and the
    number of images with which the problem begins."""

    problem: str
    solution: str
    history: tuple[dict[str, str], ...]
    images: int = 0


def parsed(value: Any) -> Any:
    """The list or object that a string represents, as JSON or as Python's repr, which pandas writes
    to CSV; other values are returned as they are."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return value


def as_messages(value: Any, shown: list[int] | None = None) -> list[dict[str, str]] | None:
    """The value as messages with `role` and `content`; None if it is no list of messages.

    Contents may be lists of parts. shown: the places of images at a content's beginning, which are
    left out: for each the number of its message is added; None: they are refused. Raises
    NotTextError for other images, and for tools.
    """
    value = _by_message(parsed(value))
    if not isinstance(value, list) or not value:
        return None
    messages: list[dict[str, str]] = []
    for entry in value:
        if not isinstance(entry, Mapping):
            return None
        role = entry.get("role", entry.get("from"))
        content = entry.get("content", entry.get("value"))
        if not isinstance(role, str):
            return None
        role = ROLES.get(role.casefold(), role.casefold())
        if role in TOOLS or entry.get("tool_calls"):
            raise NotTextError("calls tools, whose results the model would be taught to make up")
        if isinstance(content, list):
            parts = [{"text": part} if isinstance(part, str) else part for part in content]
            parts = [part for part in parts if isinstance(part, Mapping)]
            while shown is not None and parts and parts[0].get("type") == "image":
                shown.append(len(messages))
                parts = parts[1:]
            kinds = {str(part.get("type", "text")) for part in parts} - TEXTS - {"thinking"}
            if kinds:
                said = f"holds parts that are no text: {', '.join(kinds)}"
                where = NO_COLUMN if shown is None else NOT_FIRST
                raise NotTextError(said + (where if "image" in kinds else ""))
            thoughts = [part["thinking"] for part in parts if part.get("thinking")]
            entry = {**entry, "thinking": thoughts[0]} if thoughts else entry
            content = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
        if content is None and "content" in entry:
            raise NotTextError(f"has a message of the {role} without content")
        if not isinstance(content, str):
            return None
        thought = next(filter(None, map(entry.get, THOUGHTS)), None)
        if role == "assistant" and isinstance(thought, str):
            content = f"<think>\n{thought.strip()}\n</think>\n\n{content.lstrip()}"
        messages.append({"role": role, "content": content})
    return messages


def _by_message(value: Any) -> Any:
    """`{"role": […], "content": […]}`, as older `datasets` store messages, as a list of these."""
    if not isinstance(value, Mapping) or not {"role", "from"} & value.keys():
        return value
    lists = list(value.values())
    if not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        return value
    return [dict(zip(value, one, strict=True)) for one in zip(*lists, strict=True)]


def read_chat(value: Any, images: bool = False) -> Chat | None:
    """The value as a Chat; None if it is no list of messages or has no user message. images: the
    row's are in a column of their own."""
    shown: list[int] = []
    messages = as_messages(value, shown if images else None)
    users = [i for i, m in enumerate(messages or []) if m["role"] == "user"]
    if not messages or not users:
        return None
    last = users[-1]
    if any(number != last for number in shown):
        raise NotTextError("has images before its last question, which no prompt shows")
    answers = [n for n in range(last + 1, len(messages)) if messages[n]["role"] == "assistant"]
    solution = messages[answers[-1]]["content"] if answers else ""
    own = _by_message(parsed(value))[answers[-1]] if answers else {}
    if 0 in (own.get("weight"), own.get("train")):  # OpenAI's and Axolotl's sign: not to be learnt
        solution = ""
    return Chat(messages[last]["content"], solution, tuple(messages[:last]), len(shown))


def read_pair(record: Mapping[str, Any]) -> Chat | None:
    """Reads a problem and a solution from plain columns: Alpaca's `instruction`, `input` and
    `output`, or the texts `prompt` and `completion` (or `chosen`). None if there are none."""
    asked, said, more = (record.get(name) for name in ("instruction", "output", "input"))
    if not isinstance(asked, str):
        asked, said = record.get("prompt"), record.get("completion", record.get("chosen"))
        return Chat(asked, said, ()) if isinstance(asked, str) and isinstance(said, str) else None
    if record.get("history") or not isinstance(more, str | None):
        raise NotTextError("has `history`, or an `input` that is no text: write it as `messages`")
    asked = f"{asked}\n\n{more}" if more and more.strip() else asked
    return Chat(asked, said if isinstance(said, str) else "", ())


def last_answer(value: Any) -> str | None:
    """The assistant's last message in a list of messages; None if there is none."""
    answers = [m["content"] for m in as_messages(value) or [] if m["role"] == "assistant"]
    return answers[-1] if answers else None
