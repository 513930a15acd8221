"""Texts of rows that are alike, put together of what a worker found of one: as it makes them."""

import pickle
import random
import time

import pytest

from opsd.common import skeletons, templates
from opsd.common.template_worker import answer
from opsd.common.templates import (
    TemplateFailure,
    _job,
    fill_in,
)

ALIKE = [
    "{{ a }}|{{ b }}\n\n",
    "{% if a %}{{ a|trim|upper }}{% elif not b %}x{% else %}{{ b ~ a }}{% endif %}",
    "{% for c in [a, b] %}{{ loop.index }}{{ c }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% set t = a|default('x') %}{{ t.strip('p ') }}{{ (t ~ '.') if 's' in t else t + t }}",
    "{% macro m(t) %}<{{ t }}>{% endmacro %}{{ m(a) ~ m(m(a)) }}",
    "{% filter trim %}{{ a }}{% endfilter %}",
    "{% set n = namespace() %}{% for p in a.split('%') %}{% set n.t = p %}{% endfor %}{{ n.t }}",
    "{{ a.split('%')[0].lstrip() }}{{ a.startswith('p') }}{{ a == 'p' }}{{ a in ['q', 'p'] }}",
    "{{ a is string }}{{ a is number }}{{ b is defined }}{{ b is string }}{{ a is mapping }}",
    "{% set c %}{{ a }}{{ b }}{% endset %}{{ c }}{{ 'x' if c else 'y' }}",
    "{{ a.removeprefix('p')|capitalize }}{{ {'k': a}.k }}{{ [a, 'b'][0] }}",
    "{{ '%' ~ b|string ~ (b == 2.5) }}{{ a is none }}{{ a|string|trim }}",
    "{% if a|length > 2 and b != 7 %}{{ a|length }}{% endif %}{{ a|count <= 1 }}{{ b }}",
    "{{ a[:2] }}{{ a[-3:]|trim }}{{ a[::-1] }}{% if a[:1] == 'p' %}x{% endif %}",
    "{{ a|replace('p', 'q') }}{{ a.replace('%', '', 1) }}{{ a|replace('r', '', count=1) if 0 }}",
    "{{ self }}{{ range is defined }}{# no #}{% raw %}{{ a }}{% endraw %}",
]
"""Templates that only show, trim and test texts, and so need a worker for some rows alone."""


LOOK = [
    "{{ a|length }}",
    "{{ a * 2 }}",
    "{{ a[0] }}",
    "{{ a|list }}",
    "{{ a|int }}{{ a|float(5) }}",
    "{{ {a: 1}[a] }}",
    "{{ {'p': 1}[a] }}",
    "{{ 'abc'[a] is defined }}",
    "{{ a|replace('p', 'q') }}",
    "{{ '%s' % a }}",
    "{{ '{}'.format(a) }}",
    "{{ a ~ b if a < 'q' else 1 }}",
    "{{ [a] }}",
    "{{ a|tojson }}",
    "{{ a.upper is defined }}{{ a.nothing is defined }}",
    "{{ a|join('-') }}",
    "{{ [a, 'p']|unique|list }}",
    "{{ a in 'pq' }}",
    "{{ (a ~ 'x')|length }}",
    "{{ b + 1 }}",
    "{{ b > 1 }}",
    "{{ b >= 2.5 }}{{ 1 < b }}{{ b <= a|length }}",
    "{{ a[::0] }}",
    "{{ a['1':] }}",
    "{{ a[b:] }}",
    "{{ a|replace('p', 'qq') }}",
    "{{ a|replace('', 'q') }}",
    "{{ a|replace('p', 'q', 1) }}{{ a|replace(old='p', new='q') }}",
    "{{ a|replace(a, 'q') }}{{ 'p'|replace('p', a) }}",
    "{{ a|length * 2 }}{{ a|length == b }}",
    "{{ 'p' * a|length }}",
    "{{ b|length }}",
    "{{ a.size() is defined }}{{ a.size is defined }}",
    "{% autoescape true %}{% set c = a|replace('p', '<') %}{% endautoescape %}{{ c }}",
    "{{ b|round }}",
    "{{ b is number }}",
    "{{ a.split() }}",
    "{{ a.split('%', 1) }}",
    "{{ a is iterable and a is not string }}{{ a|first }}",
    "{{ a|safe }}{{ a|e }}",
    "{{ a is lower }}",
    "{{ [1, 2]|map('string')|join(a) }}",
    "{{ a is sameas a }}",
    "{{ a.encode() }}",
    "{{ a|attr('x') }}",
    "{% for c in a %}{{ c }}{% endfor %}",
    "{{ ''.join([a]) }}",
    "{{ a.split(a) }}",
    "{{ b ~ b // 2 }}",
    "{% set x = a|upper %}{{ x == 'P' }}{{ x[1:] }}",
    "{{ a|groupby(0) }}",
    "{{ (a, b)|max }}",
    "{{ range(a|length)|list }}",
    "{{ 'p'.startswith(a) }}",
    "{{ dict(k=a) }}",
    "{{ a.isdigit() }}",
    "{% autoescape true %}{{ a }}{{ a ~ b }}{% endautoescape %}",
    "{{ [a, b]|sort }}",
    "{{ b == true }}",
    "{{ a|default('x', true) }}{{ a.format(1) }}",
    "{{ [[a]]|sum(start=[]) }}",
    "{{ a == b }}",
]
"""Templates that look into texts: each by another way of Python's or Jinja's."""


TEXTS = [
    "p",
    "",
    " p ",
    "q%r%",
    "é\u2028\x00",
    " x% {0} ",
    "{{ a }}",
    "<b>&",
    "7",
    "-1.5",
    "P",
    "ß",
    "\ud800",
    "x" * 3000,
]


NUMBERS = [1, 0, -0.0, 2.5, 10**30, float("nan"), 10**5000, True, None, "s", ["x"]]


def rows_alike(text: str) -> list[dict]:
    """Each text with each number, those for which the template is an error left out."""
    rows = [{"a": one, "b": other} for one in TEXTS for other in NUMBERS]
    return [row for row in rows if type(_outcome(lambda: _worker(text, [row]))) is list]  # noqa: B023


def _worker(text: str, rows: list) -> list[str]:
    return templates._made(text, "prompts", (text,), rows)


@pytest.mark.parametrize("text", ALIKE + LOOK)
def test_what_is_put_together_here_is_what_a_worker_makes(text, monkeypatch):
    """Whatever the template does with its texts, and in whatever order the rows come."""
    monkeypatch.setattr(templates, "BATCH_ROWS", 6)
    monkeypatch.setattr(templates, "ROUNDS", 99)
    rows = rows_alike(text)
    random.Random(text).shuffle(rows)
    assert fill_in(text, rows) == [_worker(text, [row])[0] for row in rows]
    for bad in ({"a": "\ud800", "b": "s"}, {"a": "p"}, {}):
        assert _outcome(lambda: fill_in(text, [bad])) == _outcome(lambda: _worker(text, [bad]))  # noqa: B023


def test_a_template_that_looks_into_no_text_needs_a_worker_for_few_rows(monkeypatch):
    rows = [{"a": f"p{number}", "b": number} for number in range(5000)]
    asked, made = [], templates._made
    monkeypatch.setattr(templates, "_made", lambda *given: asked.append(given[3]) or made(*given))
    for text in ALIKE:
        fill_in(text, rows)
    assert sum(map(len, asked)) <= len(ALIKE) * 4 * templates.BATCH_ROWS


def test_a_text_that_is_too_long_is_for_a_worker_to_refuse(monkeypatch):
    text = "{{ a ~ a }}" * 200
    fill_in(text, [{"a": "p"}] * 99)
    known = templates._known(text, "prompts", bytes(_job(text)))
    assert known.fill({"a": "q"}) == "q" * 400 and known.fill({"a": "q" * 50_000}) is None
    with pytest.raises(TemplateFailure, match="has more than"):
        fill_in(text, [{"a": "q" * 60_000}])


def test_a_template_whose_rows_are_never_alike_is_left_to_the_worker(monkeypatch):
    asked = []
    reply = templates._reply
    monkeypatch.setattr(templates, "_reply", lambda *a: asked.append(bytes(a[1])) or reply(*a))
    text = "{{ x }}{{ a }}"
    rows = [{"x": "b", "a" if n == 0 else f"a{n}": "p", "a": "q"} for n in range(3000)]
    assert fill_in(text, rows) == ["bq"] * 3000
    assert len(asked) < 120


TRUTH_OF_NOTHING = (
    "{% set n = namespace(t=x) %}{% for i in range(300) %}{% set n.t = n.t ~ x %}{% endfor %}"
    "{% set y = n.t %}{% for i in range(3000) %}{% if y %}a{% endif %}{% endfor %}"
)
"""Quick for an empty text; a text that nothing can look into is 300 that have to be asked."""


@pytest.mark.parametrize("most", [skeletons.MOST_SECONDS, 1e-9])
def test_learning_what_takes_long_is_given_up(most, short, monkeypatch):
    """Whether a limit ends it, or it is only slow: for each row it was tried anew."""
    monkeypatch.setattr(skeletons, "MOST_SECONDS", most)
    asked, reply = [], templates._reply
    monkeypatch.setattr(templates, "_reply", lambda *a: asked.append(bytes(a[1])) or reply(*a))
    rows = [{"x": "", f"a{number}": True} for number in range(200)]
    text = TRUTH_OF_NOTHING if most == 1 else "{{ x }}"
    assert fill_in(text, rows) == [""] * 200
    count = sum(b"skeletons" in job for job in asked)
    assert 1 <= count <= (4 if most == 1 else 1)  # a limit of 0.3 s in 1 s


LOOP_OF_90 = "{% for n in range(90) %}{% set y = x|trim(n|string)" + "|lower|upper" * 9 + " %}"


WORK = {
    "tests": LOOP_OF_90 + "{% if y == 'a' %}{% endif %}{% endfor %}",
    "pieces": LOOP_OF_90 + "{{ y }}{% endfor %}",
}


@pytest.mark.parametrize("name", WORK)
def test_what_is_put_together_here_takes_no_longer_than_a_worker_may(name, short):
    """After short rows a long one: its text would be passed over thousands of times."""
    fill_in(WORK[name], [{"x": "\u0390"}] * 100)
    known = templates._known(WORK[name], "prompts", bytes(_job(WORK[name])))
    begun = time.process_time()
    assert known.fill({"x": "\u03b1"}) is not None and known.fill({"x": "\u0390" * 50_000}) is None
    assert time.process_time() - begun < 0.2


def test_what_was_learnt_takes_little_memory():
    tests = "".join(f"{{% if x == '{number}' %}}b{{% endif %}}" for number in range(90))
    text = "{% set b = 'a' * 300000 %}{{ b ~ x }}" + tests
    rows = [{"x": str(number % 90)} for number in range(300)]
    assert fill_in(text, rows) == ["a" * 300000 + row["x"] + "b" for row in rows]
    known = templates._known(text, "prompts", bytes(_job(text)))
    kept = pickle.dumps([one.pieces for one in leaves(known._known)])
    assert 0 < len(kept) < (1 << 22) + 1000
    many = "{{ 'a' * 1000000 ~ x }}" * 2
    reply = answer(_job("skeletons", ("prompts", (many,)), [{"x": "b"}]))
    assert len(reply) < 1000


def leaves(place: dict):
    """All pieces that were learnt."""
    for found in place.values():
        if isinstance(found, skeletons._Fork):
            yield from leaves(found.after)
        elif isinstance(found, skeletons._Pieces):
            yield found


def _outcome(work):
    try:
        return work()
    except TemplateFailure as failure:
        return str(failure)
