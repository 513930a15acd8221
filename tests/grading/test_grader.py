"""What counts as the right answer, and that no answer can hang, kill or fool the grader."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from opsd.common.errors import UserError
from opsd.common.workers import _Worker
from opsd.data.boxed import last_boxed
from opsd.grading import grader as grading
from opsd.grading.grader import Grade, Grader

ROOT = Path(__file__).parents[2]


def boxed(answer):
    return f"So the answer is \\boxed{{{answer}}}."


@pytest.fixture(scope="module")
def grader():
    with Grader(timeout=20) as grader:
        yield grader


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1, 2)}", r"\{1, 2)"),  # escaped braces do not count
        (r"\boxed{\boxed{3}}", "3"),
        (r"} \boxed{4} {", "4"),
        (r"\boxed{8} and \boxed{12", "8"),  # the cut-off box is none
        (r"\boxed{12", None),
        (r"x \\boxed{3}", None),  # TeX: a line break and a word
        (r"\boxed 5", "5"),
        (r"\boxed{3} or \boxed{5}", "3, 5"),
        (r"\boxed{7} \boxed{\ldots}", "7"),
        ("", None),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_last_boxed_takes_linear_time():
    start = time.monotonic()
    assert last_boxed("\\boxed{" * 300_000) is None
    assert last_boxed("\\boxed{" * 300_000 + "1" + "}" * 300_000) == "1"
    assert time.monotonic() - start < 10


CHEAP = [
    ("5", "5", True),
    ("5", "6", False),
    ("5", "-5", False),
    ("-0", "0", True),
    ("\N{MINUS SIGN}5", "-5", True),
    ("+7", "7", True),
    ("042", "42", True),
    ("1,234", "1234", True),
    ("1{,}234", "1234", True),
    ("12,34", "1234", None),  # not thousands: a list perhaps
    ("$5$", "5", True),
    ("\\$5", "5", None),
    ("5.", "5", True),
    ("5.0", "5", True),
    ("5.5", "5", False),
    ("9" * 3000, "9" * 3000 + ".0", True),  # beyond Python's limit of int(str)
    ("\\text{Monday}", "Monday", True),
    ("monday", "Monday", True),
    ("Tuesday", "Monday", False),
    ("\\left( 1, \\dfrac{1}{2} \\right)", "(1,\\frac{1}{2})", True),
    ("1 1/2", "11/2", False),  # no space that means something is dropped
    ("1 000 000", "1000000", True),
    ("1:2:3", "1:3:2", None),
    ("101_2", "5_{10}", None),
    ("x_1", "x_2", None),
    ("1, 2, \\ldots, n", "1,2,\\dots,n", True),
    ("9:05", "9:5", None),
    ("silent", "listen", False),  # to math-verify the same product of letters
    ("on", "no", False),
    ("No", "no", True),
    ("a  b", "a b", True),
    ("", "5", False),
    ("\\frac{1}{2}", "\\frac{1}{2}", True),
]


@pytest.mark.parametrize("given, answer, verdict", CHEAP)
def test_cheap_cases_decide_without_a_worker(given, answer, verdict):
    grade = grading._grade_here(given, answer)
    assert (None if grade is None else grade.correct) is verdict


def test_easy_answers_start_no_process():
    with Grader() as grader:
        grades = grader.grade([boxed("4"), boxed("5"), "four"], ["4", "4", "4"])
        assert [grade.correct for grade in grades] == [True, False, False]
        assert grades[2] == Grade(False, "no \\boxed answer", None)
        assert grader._workers.pool == []


MATHEMATICS = [
    ("\\frac{1}{2}", "1/2", True),
    ("0.5", "1/2", True),
    ("\\dfrac{3}{7}", "\\frac{3}{7}", True),
    ("\\frac{7}{3}", "\\frac{3}{7}", False),
    ("x=5", "5", True),
    ("x=6", "5", False),
    ("5\\text{ cm}", "5", True),
    ("50\\%", "0.5", True),
    ("2\\sqrt2", "\\sqrt{8}", True),
    ("sqrt(8)", "2\\sqrt{2}", True),
    ("pi/2", "\\frac{\\pi}{2}", True),
    ("3.14", "\\pi", False),
    ("(x+1)^2", "x^2+2x+1", True),
    ("(x+1)^2", "x^2+1", False),
    ("yx", "xy", True),
    ("\\{2,1\\}", "\\{1,2\\}", True),
    ("(2,1)", "(1,2)", False),
    ("[1,2)", "(1,2]", False),
    ("1 \\le x \\le 2", "[1,2]", True),
    ("90^\\circ", "90", True),
    ("5 or 6", "5", False),
    ("10^3", "1000", True),
    ("}{", "5", False),
    ("\\frac{", "5", False),
    ("\x00\ud800é∞", "5", False),
]


def test_mathematics(grader):
    grades = grader.grade(
        [boxed(given) for given, _, _ in MATHEMATICS], [a for _, a, _ in MATHEMATICS]
    )
    wrong = [
        (case, grade)
        for case, grade in zip(MATHEMATICS, grades, strict=True)
        if grade.correct is not case[2]
    ]
    assert wrong == []


def test_works_off_the_main_thread_and_from_several(grader):
    results = {}

    def work(name):
        results[name] = [
            g.correct for g in grader.grade([boxed("2x/4"), boxed(f"{name}x/3")], ["1x/2", "1x/3"])
        ]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1: [True, True], 2: [True, False], 3: [True, False], 4: [True, False]}


def test_an_endless_answer_costs_its_worker_and_nothing_else():
    with Grader(timeout=1.5) as grader:
        assert grader.grade([boxed("2x/4")], ["1x/2"])[0].correct
        first = grader._workers.pool[0].process
        hostile = boxed("(x+y+z+w)^{200}")
        grades = grader.grade(
            [hostile, boxed("3x/6"), hostile, boxed("1x/4")], ["5x/7", "1x/2", "5x/7", "1x/2"]
        )
        assert [grade.correct for grade in grades] == [False, True, False, False]
        assert grades[0].reason == grades[2].reason == "no verdict within 1.5 s"
        assert first.poll() == -signal.SIGPROF


HOSTILE = {
    "10**10**10": "",
    "10^{10^{10}}": "too large",
    "9^{9^{9^{9}}}": "too large",
    "2^{3^{100000}}": "too large",
    "(10^{10})!": "",
    "100000000!": "too large",
    "\\binom{1000000000}{500000000}": "too large",
    "1e999999999": "too large",
    "\\sum_{k=1}^{10000000000} k^k": "",
    "(x+y+z+w)^{200}": "",
    "x" * 4_000_000: "4000 characters",
    "7" * 4_000_000: "4000 characters",
    "(" * 1500 + "1" + ")" * 1500: "",
    "\\frac{1}{" * 200 + "1" + "}" * 200: "",
    "|" * 2001: "",
    "-" * 3900 + "1": "",
    "1" + " " * 3900 + "2": "not understood",  # what a quadratic pattern would choke on
    "\\text{" * 500 + "}" * 500: "",
    "1," * 1900 + "1": "",
    "\x00" * 100 + "5": "",
    "1\x00/2": "",
    "\ud800/2": "",
}


def test_hostile_answers_score_zero_promptly_with_a_reason():
    with Grader(timeout=0.4) as grader:
        assert grader.grade([boxed("2x/4")], ["1x/2"])[0].correct  # the worker is up
        for answer, reason in HOSTILE.items():
            start = time.monotonic()
            hostile, honest = grader.grade([boxed(answer), boxed("3x/6")], ["5x/7", "1x/2"])
            name = answer[:40]
            assert not hostile.correct and hostile.reason and reason in hostile.reason, name
            assert honest.correct and not honest.failed, name
            assert time.monotonic() - start < 30, name  # on a busy machine
            assert hostile.failed or "verdict" not in hostile.reason, name


def test_what_is_too_large_and_what_is_not():
    from opsd.grading.answers.bounds import too_large

    for answer in ("2^{2024}", "2^{2^{2^2}}", "10^{-30}", "2023!", "\\binom{2024}{12}", "9^9"):
        assert not too_large(answer), answer
    for answer in ("2^{2^{2^{2^{2^2}}}}", "10 ** 10 ** 6", "3^(3^13)", "\\dbinom{300000}{5}"):
        assert too_large(answer), answer
    with Grader() as grader:  # the same text needs no computing
        assert grader.grade([boxed("2^{3^{2024}}")], ["2^{3^{2024}}"])[0].correct
        grade = grader.grade([boxed("2^{3^{2025}}")], ["2^{3^{2024}}"])[0]
        assert not grade.correct and grade.failed and grader._workers.pool == []


def test_an_answer_that_needs_too_much_memory_costs_its_worker(tmp_path, monkeypatch):
    # A stand-in, since what in sympy allocates fast differs from version to version.
    (tmp_path / "math_verify.py").write_text(
        "from dataclasses import make_dataclass\n"
        "class LatexExtractionConfig:\n"
        "    normalization_config = make_dataclass('Rules', [('units', bool, True)])()\n"
        "    def __init__(self, **_):\n"
        "        pass\n"
        "ExprExtractionConfig = LatexExtractionConfig\n"
        "class parser: pass\n"
        "parse = lambda text, **_: [text]\n"
        "def verify(gold, given, **_):\n"
        "    return bool(bytearray(1 << 30)) if '777' in given[0] else True\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Grader(memory_limit=256 << 20) as grader:
        grades = grader.grade([boxed("x+777"), boxed("x+1")], ["2x", "3x"])
        assert [grade.correct for grade in grades] == [False, True]
        assert "memory" in grades[0].reason
    with Grader(memory_limit=3 << 30) as grader:  # and it is the limit that decides
        assert grader.grade([boxed("x+777")], ["2x"])[0].correct


def test_a_worker_killed_from_outside_while_idle_costs_no_verdict():
    with Grader(workers=2) as grader:
        pairs = [boxed("2x/4"), boxed("3x/6"), boxed("4x/8")], ["1x/2"] * 3
        grader.grade(*pairs)
        assert len(grader._workers.pool) == 2
        for worker in grader._workers.pool:
            worker.process.kill()
            worker.process.wait()
        assert all(grade.correct for grade in grader.grade(*pairs))


def test_equal_pairs_are_judged_once(monkeypatch):
    with Grader() as grader:
        seen = []
        monkeypatch.setattr(
            grader,
            "_judge",
            lambda jobs: seen.extend(jobs) or {job: (True, "equal", False) for job in jobs},
        )
        grades = grader.grade([boxed("1x/2")] * 8 + [boxed("1x/3")], ["2x/4"] * 9)
        assert seen == [("1x/2", "2x/4"), ("1x/3", "2x/4")]
        assert [grade.extracted for grade in grades] == ["1x/2"] * 8 + ["1x/3"]


def test_an_interrupted_call_leaves_no_stale_reply(monkeypatch):
    with Grader() as grader:

        def interrupt(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(_Worker, "receive", interrupt)
            with pytest.raises(KeyboardInterrupt):
                grader.grade([boxed("2x/4")], ["1x/2"])
        assert grader._workers.pool == []
        assert not grader.grade([boxed("1x/3")], ["1x/2"])[0].correct


def test_close_and_collection_end_the_workers():
    grader = Grader()
    grader.grade([boxed("2x/4")], ["1x/2"])
    process = grader._workers.pool[0].process
    grader.close()
    assert process.poll() is not None
    assert grader.grade([boxed("2x/4")], ["1x/2"])[0].correct  # and it can start again
    process = grader._workers.pool[0].process
    del grader
    assert process.poll() is not None


def test_a_script_without_a_main_guard_and_without_torch(tmp_path):
    script = tmp_path / "grade.py"
    script.write_text(
        "import json, sys\n"
        "from opsd.grading.grader import Grader\n"
        "grader = Grader()\n"
        "grade = grader.grade([r'\\boxed{2x/4}'], ['x/2'])[0]\n"
        "worker = grader._workers.pool[0].process.pid\n"
        "loaded = [name in sys.modules for name in ('torch', 'sympy')]\n"
        "print(json.dumps([grade.correct, worker, *loaded]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    correct, worker, torch, sympy = json.loads(run.stdout)
    assert (correct, torch, sympy, run.stderr) == (True, False, False, "")
    with pytest.raises(ProcessLookupError):  # the script ended: so did its worker
        os.kill(worker, 0)


def test_a_worker_that_cannot_start_is_an_error_with_advice(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Grader() as grader, pytest.raises(UserError, match=r"broken.*pip install"):
        grader.grade([boxed("2x/4")], ["1x/2"])


def test_wrong_arguments_are_named():
    for arguments, name in [
        ({"timeout": 0}, "timeout"),
        ({"workers": 0}, "workers"),
        ({"memory_limit": 1}, "mem"),
    ]:
        with pytest.raises(UserError, match=name):
            Grader(**arguments)
    with Grader() as grader:
        with pytest.raises(ValueError, match="2 completions for 1"):
            grader.grade(["a", "b"], ["1"])
        with pytest.raises(ValueError, match=r"answers\[1\]"):
            grader.grade(["a", "b"], ["1", " "])
