"""Chats and cards of datasets as strangers write them, drawn by a seed."""

import json

import yaml

from helpers.mutations import changed, damaged, odd_value

REPRS = [
    "{{1}}", "[{[1]: 2}]", "{1, 1}", "[...]", "[b'a']", "[1_0, 0x1]", "[1e999, -1j]", "{**{}}",
    "['\\q']", "[" * 5000, "{'a':" * 999, "[{'role': 'user', 'content': {1}}]", "{}", "[]", "[[]]",
    "[{b'role': 'user'}]", "{'role': ['user'], 'content': ['a']}", "{'role': 'user'}", "[f'{1}']",
    "[{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b', 'thinking': [1]}]",
    "\\frac{{1}}{2}", "{x \\in A}", "[2, 3)", "[\x00]", "{'a'\n: 1}", "\u00a0[1]",
    "[9" + "9" * 5000,
]  # fmt: skip
"""Texts that seem to be Python's repr of a chat, as pandas writes them, or LaTeX."""


def odd_chat(draw, record: dict) -> dict:
    """A chat with parts, roles, thoughts, tools or images of odd types, or as its repr."""
    record = json.loads(json.dumps(record))
    if "messages" not in record or draw.random() < 0.3:
        return record | {draw.choice([*record, "prompt", "completion"]): draw.choice(REPRS)}
    message = draw.choice(record["messages"])
    part = {"type": "text", "text": message["content"]}
    field = draw.choice(["content", "content", "role", "thinking", "tool_calls", "name", "from"])
    if field == "content":
        part[draw.choice(["type", "text", "thinking", "image"])] = odd_value(draw, "text")
        message["content"] = draw.choice([[part], [part, "a"], part, [[part]], [part] * 300])
    else:
        message[field] = odd_value(draw, "user")
    as_text = draw.choice([repr, json.dumps, str.upper, lambda chat: chat])
    return record | {"messages": as_text(record["messages"]) if as_text != str.upper else message}


def card(draw) -> bytes:
    """The card of a directory of data files: names of files, aliases, damage."""
    part = {"split": draw.choice(["train", "train", "test"]), "path": "rows.jsonl"}
    config = {"config_name": draw.choice(["default", "a", ""]), "data_files": [part]}
    good = {"license": "mit", "configs": [config], "dataset_info": {"config_name": "default"}}
    kind = draw.randrange(8)
    if kind == 0:
        lines = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
        return f"a0: &a0 [x]\n{lines}configs: {draw.choice(['[]', '*a8', '[*a7]'])}".encode()
    if kind == 1:
        depth = draw.choice([50, 5000])
        odd = ["&a [*a]", "[" * depth + "]" * depth, "{a: " * depth, "[" + "[]," * 300_000 + "]"]
        return f"configs: {draw.choice([*odd, 'a' * 3_000_000])}".encode()
    if kind == 2:
        odd = ["../rows.jsonl", "file:rows.jsonl", "/etc/passwd", "https://a/b.jsonl", "**", "*.py"]
        odd += [
            "local:/etc/passwd",
            "zip://a::b",
            "rows.jsonl::",
            "~/rows.jsonl",
            "d/../rows.jsonl",
        ]
        part["path"] = draw.choice([draw.choice(odd), [draw.choice(odd)], {"a": draw.choice(odd)}])
    elif kind > 4:
        good = changed(draw, good)
    text = yaml.safe_dump(good, allow_unicode=draw.random() < 0.5).encode("utf-8", "replace")
    return damaged(draw, text) if kind == 3 else text
