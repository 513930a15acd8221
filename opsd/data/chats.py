"""Chats in a dataset's rows: lists of messages, as instruction data keep them.

The last user message is the problem, and the assistant's last message is the solution. What stands
before that problem, a system message or earlier turns, is the row's history.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Names that roles have elsewhere (ShareGPT), → ours."""

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a whole chat; `prompt` and `completion` hold its two halves."""


class Chat(NamedTuple):
    """A chat's problem, its solution ("" without one), and the messages before the problem."""

    problem: str
    solution: str
    history: tuple[dict[str, str], ...]


def as_messages(value: Any) -> list[dict[str, str]] | None:
    """A list of messages with `role` and `content`; None where the value is no such list.

    Contents may be lists of parts, of which the texts count.
    """
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for entry in value:
        if not isinstance(entry, Mapping):
            return None
        role = entry.get("role", entry.get("from"))
        content = entry.get("content", entry.get("value"))
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "".join(text for text in texts if isinstance(text, str))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def read_chat(value: Any) -> Chat | None:
    """The parts of a list of messages; None where it is none, or has no user message."""
    messages = as_messages(value)
    users = [i for i, m in enumerate(messages or []) if m["role"] == "user"]
    if not messages or not users:
        return None
    last = users[-1]
    answers = [m["content"] for m in messages[last + 1 :] if m["role"] == "assistant"]
    solution = answers[-1] if answers else ""
    return Chat(messages[last]["content"], solution, tuple(messages[:last]))


def last_answer(value: Any) -> str | None:
    """The assistant's last message of a list of messages; None where there is none."""
    answers = [m["content"] for m in as_messages(value) or [] if m["role"] == "assistant"]
    return answers[-1] if answers else None
