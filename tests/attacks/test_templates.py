"""Templates that take time or memory, or reach for Python's insides: made up, and all bounded."""

import datetime
import re
import time

import pytest

from opsd.common import templates
from opsd.common.templates import TemplateFailure, fill_in, fill_in_chat, names
from opsd.common.workers import Workers

ATOMS = ["x", "9", "'ab'", "[1, 'a']", "(x, x)", "{'a': x}", "range(999)|list", "1.5", "n.t", "y"]
SHOWN = ["x|trim", "x ~ y", "x.split('a')", "x.strip('a')", "x|upper", "x.lower()", "(x in 'ab')"]
SHOWN += ["('a' in x)", "(x == 'a')", "x.startswith('a')", "x.split('a')[0]", "x|string", "x + 'b'"]
SHOWN += [
    "x|default('a')",
    "(x is string)",
    "x|length",
    "x[0]",
    "x[:2]",
    "f(x)",
    "loop.index",
    "(x,)",
]
FILTERS = (
    "string list sum join length sort reverse unique upper title int float abs first last random "
    "tojson pprint urlize striptags wordcount wordwrap forceescape dictsort items batch(9) "
    "slice(9) round(9) center(99999) indent(99999) replace('','ab') truncate(9) format(x) xmlattr "
    "groupby('a') map('string') attr('__class__') default(x) filesizeformat"
).split()
BINARY = ["+", "-", "*", "**", "%", "//", "/", "~", "==", "<", "in", "and", "or"]
STATEMENTS = [
    "{{ § }}",
    "{% set y = § %}",
    "{% for i in § %}{{ i }}{% endfor %}",
    "{% if § %}a{% endif %}",
    "{% for i in range(60) %}{% set n.t = § %}{% endfor %}",
    "{% macro f(a) %}{{ f(§) }}{% endmacro %}{{ f(x) }}",
    "{% macro f(a, b=x) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(§) }}",
    "{% call(a) f(x) %}{{ § }}{% endcall %}",
    "{% filter trim %}{{ § }}{{ x }}{% endfilter %}",
    "{% set y %}{{ § }}{{ x }}{% endset %}{{ y }}{{ y == x }}",
    "{% for a, b in § %}{{ a ~ x }}{% else %}{{ x }}{% endfor %}",
    "{% for i in [x, y] if § %}{{ loop.index }}{{ loop.cycle(x, i) }}{% endfor %}",
    "{% with y = § %}{{ y ~ x }}{% endwith %}",
    "{% block a %}{{ § }}{{ super() }}{% endblock %}",
    "{% include § %}",
    "{% import § as y %}",
    "{% extends § %}",
    "{% autoescape § %}{{ x }}{% endautoescape %}",
    "{% for i in x %}{{ loop(§) }}{% endfor %}",
    "{% set x = § %}{{ x }}",
    "{% do § %}",
    "{{ self.a() }}{{ varargs }}{{ x if § }}",
]
METHODS = ["format(x)", "ljust(10**9)", "split('a')", "__class__", "__init__.__globals__", "mro()"]


def expression(draw, depth: int) -> str:
    """An expression of operators, filters and methods in each other."""
    if depth == 0:
        return draw.choice(ATOMS if draw.random() < 0.7 else SHOWN)
    kind = draw.randrange(5)
    inside = expression(draw, depth - 1)
    if kind == 0:
        return f"({inside} {draw.choice(BINARY)} {expression(draw, depth - 1)})"
    if kind == 1:
        return f"({inside})|{draw.choice(FILTERS)}"
    if kind == 2:
        return f"({inside}).{draw.choice(METHODS)}"
    if kind == 3:
        return f"({inside} * {10 ** draw.randrange(10)})"
    return f"(({inside})" + f"|{draw.choice(FILTERS)}" * draw.randrange(60) + ")"


def hostile_template(draw) -> str:
    """Loops, macros and sets around expressions, some of them broken off."""
    text = ""
    for _ in range(draw.randrange(1, 4)):
        made = expression(draw, draw.randrange(1, 5))
        text += draw.choice(STATEMENTS).replace("§", made)
    text = "{% set n = namespace(t='a') %}{% set y = 1 %}" + text
    return text[: draw.randrange(len(text))] if draw.random() < 0.1 else text


@pytest.fixture(scope="module", autouse=True)
def short():
    """Workers with a fifth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        workers = Workers("opsd.common.template_worker", seconds=0.2, memory=templates.MEMORY)
        patch.setattr(templates, "_WORKERS", workers)
        yield
        workers.close()


SAID = ["", "a", "ab", " 9 ", "'ab'", "é\n", "{{ x }}", "a" * 99, "1.5", "B"]


def test_many_rows_are_filled_in_as_one_is(draw, monkeypatch):
    """What is put together of pieces is what a worker makes of each row alone."""
    monkeypatch.setattr(templates, "BATCH_ROWS", 4)
    text = hostile_template(draw).replace("range(60)", "range(3)").replace("10**9", "9")
    text = re.sub(r"\* 10+\b", "* 3", text) + draw.choice(["{{ x }}", "{{ y ~ x|trim }}", ""])
    rows = [
        {"x": draw.choice(SAID) if draw.random() < 0.8 else draw.randrange(3)} for _ in range(24)
    ]
    try:
        made = fill_in(text, rows)
    except TemplateFailure:
        return
    for row, one in zip(rows, made, strict=True):
        assert templates._made(text, "prompts", (text,), [row]) == [one]


def test_many_chats_are_filled_in_as_one_is(draw, monkeypatch):
    """The same of chats, whose roles, parts and keys differ as well."""
    monkeypatch.setattr(templates, "BATCH_ROWS", 4)
    body = hostile_template(draw).replace("range(60)", "range(3)").replace("10**9", "9")
    body = re.sub(r"\* 10+\b", "* 3", body)
    start = "{% for m in messages %}{% set x = m.content %}"
    text = f"{start}<{{{{ m.role }}}}>{body}{{{{ m.content }}}}{{% endfor %}}"
    chats = []
    for _ in range(24):
        roles = draw.choice(["u", "su", "uau"])
        chat = [{"role": role, "content": draw.choice(SAID)} for role in roles]
        one = draw.choice(chat)
        if draw.random() < 0.3:
            odd = [None, 7, [], [{"type": "text", "text": "a"}], [{"type": "image"}], ["a"], True]
            one["content"] = draw.choice(odd)
        if draw.random() < 0.2:
            one[draw.choice(["name", "", "reasoning_content"])] = draw.choice(["a", None, 1.0, []])
        chats.append((chat, draw.random() < 0.8))
    given = (text, {"eos_token": "e"}, datetime.date(2026, 11, 28))
    try:
        made = fill_in_chat(*given, chats)
    except TemplateFailure:
        return
    for chat, one in zip(chats, made, strict=True):
        assert templates._made(text, "chats", given, [chat]) == [one]


def test_a_template_makes_text_or_one_line(draw):
    for _ in range(4):
        text = hostile_template(draw)
        before = time.process_time()
        names(text)
        try:
            (made,) = fill_in(text, [{"x": 9}])
            assert templates._made(text, "prompts", (text,), [{"x": 9}]) == [made]
            assert len(made) <= 20_000_000 and "object at 0x" not in made[:1000]
        except TemplateFailure as failure:
            assert len(str(failure)) <= 2000
        assert time.process_time() - before < 1  # here; the worker has limits of its own
