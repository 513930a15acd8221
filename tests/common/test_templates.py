"""Templates of strangers: filled in as in process, but within limits of time and memory."""

import copy
import datetime
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.chat_templates import FAMILIES, WITH_LAST_QUERY
from helpers.chat_tokenizers import make_tokenizer

from opsd.common import templates
from opsd.common.errors import UserError
from opsd.common.template_worker import _ENVIRONMENT, _writes_plain_data, answer
from opsd.common.templates import (
    TemplateFailure,
    _job,
    check_template,
    fill_in,
    fill_in_chat,
    names,
)
from opsd.common.workers import Ended, Workers
from opsd.config.sections import PromptsSection
from opsd.data.chat import ChatTemplate
from opsd.grading.rewards import GradedRollout

ROOT = Path(__file__).parents[2]


LOOP = "{% for i in range(99999) %}"


NEST = (
    "{% set n = namespace(t=['a']) %}{% for i in range(60) %}{% set n.t = [n.t, n.t] %}{% endfor %}"
)


DEEP = NEST.replace("range(60)", "range(24)")


# Each of a mechanism of its own. All are refused by the kernel's count, or by Jinja's sandbox.
BOMBS = {
    "a string times a number": "{{ 'a' * 10**9 }}",
    "a list times a number": "{{ [0] * 10**9 }}",
    "a join of ranges": "{{ (range(99999)|list * 99)|join(range(9999)|join) }}",
    "a power of powers": "{{ x ** (x ** x ** x) }}",
    "constants that the optimiser folds": "{{ 9 ** (9 ** 9) }}",
    "a product of powers": "{{ (x ** 9999999) * (x ** 9999999) }}",
    "a number as text": "{{ ((x ** 4000)|string|int ** 4000) % 7 ** 99999999 }}",
    "a width in %": "{{ '%1000000000d' % x }}",
    "a width from the values": "{{ '%*d' % (10 ** 9, x) }}",
    "a width in format": "{{ '{:1000000000}'.format(x) }}",
    "a nested width": "{{ '{:{w}}'.format(x, w=10 ** 9) }}",
    "the filter format": "{{ '%1000000000d'|format(x) }}",
    "round": "{{ x|round(200000000, 'ceil') }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "indent": "{{ 'a'|indent(1000000000, true) }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "replace": "{{ ('a' * 10 ** 6)|replace('a', 'b' * 10 ** 6) }}",
    "a comparison of nests": NEST + "{% set m = n.t %}" + NEST + "{{ m == n.t }}",
    "a nest as text": NEST + "{{ n.t }}",
    "a nest as JSON": NEST + "{{ n.t|tojson }}",
    "a hash of nests": NEST.replace("[n.t, n.t]", "(n.t, n.t)").replace("['a']", "('a', 1)")
    + "{{ {n.t: 1} }}",
    "a sum with a list": "{{ ([[0] * 9999] * 99999)|sum(start=[]) }}",
    "300 filters": "{{ 'ab'" + "|replace('', 'ab')" * 300 + " }}",
    "loops in loops": LOOP * 4 + "x" + "{% endfor %}" * 4,
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "doubled text": "{% set n = namespace(t='aa') %}{% for i in range(60) %}"
    "{% set n.t = n.t ~ n.t %}{% endfor %}",
    "a captured block": "{% set n = namespace(t='aa') %}{% for i in range(60) %}{% set y %}"
    "{{ n.t }}{{ n.t }}{% endset %}{% set n.t = y %}{% endfor %}",
    "a sort of nests": DEEP + "{{ ([n.t] * 999)|sort }}",
    "groupby": "{{ (range(99999)|list * 99)|groupby('real')|list|length }}",
    "urlize": "{{ ('www.a.b(' * 9999999)|urlize }}",
    "striptags": "{{ ('<!--' * 30000000)|striptags }}",
    "wordwrap": "{{ ('a ' * 9999999)|wordwrap(1) }}",
    "translate": "{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 6}) }}",
    "a clock's width": "{{ strftime_now('%Y' * 30000000) }}",
}  # fmt: skip


TODAY = datetime.date(2026, 11, 28)


def fill(text: str) -> list[str]:
    if "strftime" in text or "tojson" in text:
        return fill_in_chat(text, {"x": 9}, TODAY, [([], True)])
    return fill_in(text, [{"x": 9}] * 200)


@pytest.mark.parametrize("how", BOMBS)
def test_a_bomb_is_refused_in_one_line(how, short):
    with pytest.raises(TemplateFailure) as failure:
        fill(BOMBS[how])
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 200
    assert fill_in("{{ x }}", [{"x": 1}]) == ["1"]


def test_the_limits_are_two_seconds_and_200_mb():
    assert len(BOMBS) > 20
    templates._WORKERS.close()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(UserError, match=r"^prompts.teacher is not a Jinja template: it takes too"):
        check_template("prompts.teacher", BOMBS["constants that the optimiser folds"])
    with pytest.raises(TemplateFailure, match="of processor time"):
        fill_in("{{ x ** (x ** x ** x) }}", [{"x": 9}])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 2
    with pytest.raises(TemplateFailure, match="of memory"):
        fill_in("{{ ('a' * x)|length }}", [{"x": 300_000_000}])
    fill_in("{{ x * 1 }}", [{"x": 1}])
    (worker,) = templates._WORKERS.pool
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    most = resource.prlimit(worker.process.pid, resource.RLIMIT_AS)[0]
    free = most - (int(status.split("VmSize:")[1].split()[0]) << 10)
    # With the libraries' pages too, of which machines map more or fewer: 18 to 42 MB.
    assert 0 < free + (int(status.split("VmRSS:")[1].split()[0]) << 10) < 200e6


def test_a_models_template_is_refused_by_its_field(short):
    tokenizer = copy.copy(make_tokenizer(FAMILIES[0]))
    tokenizer.chat_template = BOMBS["doubled text"]
    with pytest.raises(UserError, match=r"^model.path has a chat template .* too much"):
        ChatTemplate(tokenizer)


def test_batches_that_shrink_hold_nothing_of_the_ones_before():
    text = "{{ x.split('a')|join('b') }}"
    rows = [{"x": f"{number}a" * (1 + (3999 - number) // 4)} for number in range(4000)]
    assert fill_in(text, rows) == [row["x"].replace("a", "b") for row in rows]


def test_only_shipped_templates_are_filled_in_here(monkeypatch):
    seen = []
    reply = answer(_job("prompts", ("A",), [{}]))
    monkeypatch.setattr(templates._WORKERS, "answers", lambda jobs: seen.append(jobs) or [reply])
    section = PromptsSection()
    for text in (section.student, section.teacher, section.target):
        assert names(text) <= {"problem", "solution"}
        fill_in(text, [{"problem": "p", "solution": "s"}])
    assert seen == []
    assert fill_in("{{ problem }} ", [{"problem": "p"}]) == ["A"]


CONVERSATIONS = [
    [{"role": "user", "content": "What is 1 + 2? <|im_end|> é 数 \u200b\n "}],
    [
        {"role": "user", "content": "A"},
        {
            "role": "assistant",
            "content": "<think>\nB\n</think>\n\nC",
            "thinking": "T",
            "name": None,
        },
        {"role": "user", "content": "D", "reasoning": 3},
    ],
    [{"role": "system", "content": " S "}, {"role": "user", "content": ""}],
]


ODD = {
    "namespace": "{% set n = namespace(self=1, a=2) %}{% set n.b = 3 %}{{ n.b }}{{ n.self }}",
    "a hidden name": "{% set n = namespace(_a=2) %}",
    "a hidden key": "{% set n = namespace() %}{% set n._a = 1 %}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys('ab', 2) }}{{ dict.mro is defined }}",
    "JSON": "{{ messages|tojson(indent=2) }}{{ {'é': '<'}|tojson(ensure_ascii=True) }}",
    "loop controls": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "generation": "{% generation %}{{ messages[0].content }}{% endgeneration %}\n",
    "blocks": "  {% if true %}\n  a\n  {% endif %}\n{{ undefined_name }}|{{ 1 }}\n",
    "the clock": "{{ strftime_now('%d %B %Y') }}{{ strftime_now is defined }}",
    "tools": "{{ tools }}{{ documents }}{{ own }}{{ eos_token }}{{ when }}{{ nothing }}",
    "an exception": "{{ raise_exception('no ' ~ messages[0].role) }}",
    "reasoning": "{% for m in messages %}{{ m.keys()|list }}{{ m.reasoning_content }}{% endfor %}",
    "an attribute": "{{ messages.append(1) }}",
}  # fmt: skip


def outcomes(tokenizer, template, messages, prompt, arguments) -> tuple[str, str]:
    """What transformers makes of a chat and what we do; of an error its text."""
    said = []
    ours = {**tokenizer.special_tokens_map, **arguments}
    for call in (
        lambda: tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
            **arguments,
        ),
        lambda: fill_in_chat(template, ours, datetime.date.today(), [(messages, prompt)])[0],
    ):
        try:
            said.append(call())
        except Exception as error:
            said.append(f"error: {error}")
    return said[0], said[1]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chats_are_rendered_as_transformers_does(messages):
    for family in FAMILIES:
        tokenizer = make_tokenizer(family)
        for prompt in (True, False):
            theirs, ours = outcomes(tokenizer, family.template, messages, prompt, family.arguments)
            assert ours == theirs, family.name


SAID = ["p", "", " \n", "<t>p</t>", "<t>", "<think>\nA\n</think>\n\nB", "a</think>b</think>"]


SAID += ["é数", " {{ p }} ", "\n<think>", "1"]


@pytest.mark.parametrize("family", [*FAMILIES, None])
def test_many_chats_are_rendered_as_transformers_does(family, monkeypatch):
    monkeypatch.setattr(templates, "BATCH_ROWS", 8)
    draw, tokenizer = random.Random(9), make_tokenizer(family or FAMILIES[0])
    template = family.template if family else WITH_LAST_QUERY
    arguments = family.arguments if family else {}
    chats = []
    while len(chats) < 150:
        roles = draw.choice(["u", "u", "u", "uau", "sua", "uaua"])
        names = {"u": "user", "a": "assistant", "s": "system"}
        chat = [{"role": names[role], "content": draw.choice(SAID)} for role in roles]
        if draw.random() < 0.2:
            chat[-1]["reasoning"] = draw.choice([None, "R", "S"])
        if draw.random() < 0.1 or "part" in template:
            for one in chat:
                one["content"] = [{"type": "text", "text": one["content"]}]
        try:
            text = tokenizer.apply_chat_template(
                chat,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **arguments,
            )
        except Exception:  # such as one that takes no system message, or no parts
            continue
        chats.append((chat, text))
    ours = {**tokenizer.special_tokens_map, **arguments}
    made = fill_in_chat(template, ours, datetime.date.today(), [(chat, True) for chat, _ in chats])
    assert made == [text for _, text in chats]


@pytest.mark.parametrize("kind", ODD)
def test_the_environment_is_that_of_transformers(kind):
    arguments = {
        "own": [1, (2, "x")],
        "when": TODAY,
        "nothing": None,
        "tools": [{"a": None}] if kind == "tools" else None,
    }
    theirs, ours = outcomes(
        make_tokenizer(FAMILIES[0]), ODD[kind], CONVERSATIONS[1], True, arguments
    )
    assert ours == theirs


def test_a_column_may_be_anything():
    row = {
        "when": TODAY,
        "many": [(1, None), {"b": b"x"}],
        "odd": Path("/a"),
        "rollout": GradedRollout("text", True, 1.0, True),
        "long": "word " * 999_999,
        "": 1,
    }
    text = (
        "{{ when.year }}{{ many }}{{ odd }}{{ rollout.text }}{{ rollout.correct }}{{ long|length }}"
    )
    wanted = "2026[(1, None), {'b': b'x'}]/atextTrue4999995"
    assert fill_in(text, [row] * 3) == [wanted] * 3
    assert fill_in("", [row] * 130) == [""] * 130 and fill_in("a", []) == []
    with pytest.raises(TemplateFailure, match="has no attribute 'txt'"):
        fill_in("{{ rollout.txt }}", [row])


NO_TEXT = ["x.upper", "[x]|map('upper')", "{}|reverse", "range", "x|unique ~ 'a'", "[x.upper]",
           "[[x]|map('upper')]|join", "(x|unique)|string|upper"]  # fmt: skip


@pytest.mark.parametrize("text", NO_TEXT)
def test_what_has_no_text_is_refused(text):
    """It would be written with its address, which is another in each process."""
    with pytest.raises(TemplateFailure, match=r"call it, or add \|list"):
        fill_in("{{ " + text + " }}", [{"x": "a"}])


def test_templates_taken_to_write_plain_data_write_no_address():
    """Each filter and method, of each kind of value, in the forms that are not searched."""
    values = {"x": "a b", "y": ["a", "b"], "z": {"a": 1}, "n": 2.5}
    names = {name for value in values.values() for name in dir(value) if name[0] != "_"}
    pieces = [f"{one}|{name}" for one in values for name in _ENVIRONMENT.filters]
    pieces += [f"{one}.{name}({more})" for one in values for name in names for more in ("", "'a'")]
    pieces += ["range|string", "y|join('', 'upper')", "y|join(*x)", "y|join(**z)", "x.upper|string",
               "x['upper']|string", "'{0.upper}'.format(x)", "y|sum(attribute='upper', start='')",
               "lipsum|string", "(y|list)|join", "x.split()|sort|join"]  # fmt: skip
    plain = 0
    for piece in pieces:
        for text in (f"{{{{ {piece} }}}}", f"{{{{ ({piece})|string }}}}", f"{{{{ [{piece}] }}}}"):
            try:
                if not _writes_plain_data(text):
                    continue
                made = _ENVIRONMENT.from_string(text).render(values)
            except Exception:  # a filter that does not take this value writes nothing
                continue
            plain += 1
            assert " at 0x" not in made, text
    assert plain > 80
    assert _writes_plain_data("{% for w in x.split(' ') %}{{ w|title }}\n{% endfor %}{{ x }}")


def test_an_address_that_a_row_has_is_text():
    said = "<list_iterator object at 0x7f3a5c2b1d90>"
    rows = [{"x": said}, {"x": f"a Traceback of {said}"}]
    assert fill_in("{{ x }}{% if x|length > 3 %}!{% endif %}", rows) == [r["x"] + "!" for r in rows]
    assert fill_in("{{ x|upper }}", rows) == [row["x"].upper() for row in rows]


def test_chance_is_the_same_each_time():
    text = "{{ range(10**5)|random }}{{ lipsum(n=1) }}"
    rows = [{"x": number} for number in range(3)]
    made = fill_in(text, rows)
    assert len(set(made)) == 3
    templates._WORKERS.close()
    assert fill_in(text, rows[::-1]) == made[::-1]


def test_names():
    assert names("{{ a.b }}{% set c = 1 %}{{ c }}{% for d in e %}{{ d }}{% endfor %}") == {"a", "e"}
    assert names("{{ a") == names("{{ " + "(" * 9999) == frozenset()


def test_no_worker_outlives_its_parent(tmp_path):
    """However it ends, and in the midst of work: the kernel ends a busy worker at once."""
    script = tmp_path / "fill.py"
    script.write_text(
        "import sys, threading, time\n"
        "from opsd.common.workers import Workers\n"
        "made = Workers('opsd.common.template_worker', seconds=100, memory=150 << 20)\n"
        "from opsd.common import templates\n"
        "templates._WORKERS = made\n"
        "templates.fill_in('{{ 1 }}', [{}])\n"
        "print(made.pool[0].process.pid, flush=True)\n"
        "templates.fill_in('{{ x ** (x ** x ** x) }}', [{'x': 9}])\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not alive(worker):
            break
        time.sleep(0.1)
    assert not alive(worker)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_reply_of_an_impossible_length_ends_its_worker(tmp_path, monkeypatch):
    """Nothing is set aside for what a worker says of itself."""
    (tmp_path / "liar.py").write_text(
        "class Lie(bytes):\n"
        "    def __len__(self):\n"
        "        return 1 << 62\n"
        "def make():\n"
        "    return lambda job: Lie()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    workers = Workers("liar", seconds=5, memory=1 << 28)
    try:
        assert workers.answers([b"job"]) == [Ended("killed")]
    finally:
        workers.close()
