"""The known benchmarks, on small files in the schema of the real ones."""

import json

import datasets
import pytest

from opsd.common.errors import UserError
from opsd.evaluate import benchmarks
from opsd.evaluate.benchmarks import KNOWN, Convention, load_benchmark
from opsd.grading.grader import Grader

# name → a record as the hub's dataset has it, and the answer it should give
SCHEMA = {
    "gsm8k": (
        {
            "question": "Anna has 4 apples and buys 3 bags of 12. How many?",
            "answer": "She buys 3*12 = <<3*12=36>>36.\nSo she has 36+4 = <<36+4=40>>40.\n#### 40",
        },
        "40",
    ),
    "math-500": (
        {
            "problem": "Compute $1/4 + 1/4$.",
            "solution": "Both are equal, so it is $\\boxed{\\frac{1}{2}}$.",
            "answer": "\\frac{1}{2}",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/algebra/1.json",
        },
        "\\frac{1}{2}",
    ),
    "aime24": (
        {
            "id": 60,
            "problem": "Find $2^3+25$.",
            "solution": "It is $8 + 25 = \\boxed{033}$.",
            "answer": "033",
            "url": "https://example.org",
            "year": "2024",
        },
        "033",
    ),
    "aime25": ({"problem": "Find $70$.", "answer": "70", "id": "0"}, "70"),
    "hmmt25": (
        {
            "problem_idx": 1,
            "problem": "Compute $1/\\sqrt{576}$.",
            "answer": "\\frac{1}{24}",
            "problem_type": ["Algebra", "Number Theory"],
        },
        "\\frac{1}{24}",
    ),
    "amo-bench": (
        {
            "question_id": 1,
            "prompt": "Find the sum of all $x$ with $x^2 = 3x$.",
            "solution": "They are 0 and 3, so the sum is $3$.",
            "answer": "\\boxed{3}",
            "answer_type": "number",
        },
        "3",
    ),
}
PROBLEM = {"gsm8k": "question", "amo-bench": "prompt"}


def test_every_known_benchmark_has_a_schema_here():
    assert set(SCHEMA) == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_rows_in_the_real_schema(name, hub):
    record, answer = SCHEMA[name]
    (row,) = load_benchmark(name).rows
    assert row.problem == record[PROBLEM.get(name, "problem")]
    assert row.answer == answer and row.columns == record
    assert row.solution == record.get("solution", record["answer"] if name == "gsm8k" else "")
    with Grader() as grader:
        # the reference answer itself is right, and so is the plain form of an AIME answer
        assert grader.grade([f"\\boxed{{{answer.lstrip('0')}}}"], [row.answer])[0].correct
        assert not grader.grade(["\\boxed{999}"], [row.answer])[0].correct


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub; the list of what it was asked for: (name, config, split, revision)."""
    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        records = [SCHEMA[key][0] for key in KNOWN if KNOWN[key].source == name]
        return datasets.Dataset.from_list(records or [{"problem": "1+1?", "answer": "2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("opsd.common.hub_offline.why_absent", lambda *which: "")
    monkeypatch.setattr(benchmarks, "_current_revision", lambda name: f"now-of-{name}")
    return asked


def test_hub_names_splits_and_spellings(hub):
    spellings = ("GSM8K", "MATH_500", "AIME-2024", "aime25", "HMMT-Feb-2025", "AMO-Bench")
    found = [load_benchmark(name) for name in spellings]
    assert [one.name for one in found] == [
        "gsm8k", "math-500", "aime24", "aime25", "hmmt25", "amo-bench"
    ]  # fmt: skip
    assert [asked[:3] for asked in hub] == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("math-ai/aime25", None, "test"),
        ("MathArena/hmmt_feb_2025", None, "train"),
        ("meituan-longcat/AMO-Bench", None, "test"),
    ]
    assert load_benchmark("aime24").convention == Convention(12, 1.0, 0.95, 38_912, True)
    load_benchmark("gsm8k", split="train")
    assert hub[-1][:3] == ("openai/gsm8k", "main", "train")


def test_revisions_are_pinned_asked_for_and_recorded(hub):
    pinned = KNOWN["gsm8k"].revision
    assert load_benchmark("gsm8k").revision == pinned == hub[-1][3] and len(pinned) == 40
    assert load_benchmark("gsm8k", revision="abc").revision == "abc" == hub[-1][3]
    assert load_benchmark("amo-bench").revision == "now-of-meituan-longcat/AMO-Bench" == hub[-1][3]
    assert load_benchmark("me/mine").revision == "now-of-me/mine" == hub[-1][3]


def test_problems_that_only_a_language_model_can_grade_are_left_out_and_counted(hub, monkeypatch):
    number = SCHEMA["amo-bench"][0]
    records = [{**number, "answer_type": "description"}, number, {**number, "answer": "4"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(records))
    benchmark = load_benchmark("amo-bench")
    assert [row.answer for row in benchmark.rows] == ["3", "4"] and benchmark.left_out == 1
    assert len(load_benchmark("amo-bench", limit=1).rows) == 1
    records[:] = [{"prompt": "1+1?", "answer": "2"}]
    with pytest.raises(UserError, match="no column 'answer_type'"):
        load_benchmark("amo-bench")


def test_the_digest_tells_contents_apart(tmp_path):
    path = tmp_path / "mine.jsonl"
    digests = set()
    for answer in ("1", "2"):
        path.write_text(json.dumps({"problem": "1+1?", "answer": answer}) + "\n")
        digests.add(load_benchmark(str(path)).digest())
        assert load_benchmark(str(path)).digest() in digests
    assert len(digests) == 2


def test_any_source_is_a_benchmark(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"q": "1+1?", "answer": 2}\n{"q": "2+2?", "answer": 4}\n')
    benchmark = load_benchmark(str(path), columns={"problem": "q"}, limit=1)
    assert [row.answer for row in benchmark.rows] == ["2"]
    assert (benchmark.name, benchmark.convention) == (str(path), Convention())
    assert len(load_benchmark("reasoning_gym:chain_sum").rows) == 200
    assert len(load_benchmark("reasoning_gym:chain_sum", limit=7).rows) == 7


def test_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, arguments, message in [
        ("gsm8", {}, r"benchmark: 'gsm8' .*did you mean 'gsm8k'.*aime24.*math-500.*reasoning_gym"),
        ("absent.jsonl", {}, r"benchmark\.source: there is no file"),
        ("reasoning_gym:nothing", {}, r"benchmark\.source: .*no task 'nothing'"),
        ("x.jsonl", {"revision": "main"}, r"benchmark\.revision.*'x\.jsonl'"),
        ("gsm8k", {"limit": 0}, r"benchmark\.limit: 0"),
    ]:
        with pytest.raises(UserError, match=message):
            load_benchmark(name, **arguments)
