"""`opsd eval`: what is asked, what is kept, and that an interruption costs nothing but time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.training_cases import ROWS, write_model, write_rows

from opsd.cli.evaluate_arguments import check
from opsd.cli.main import main, parser
from opsd.common.errors import UserError
from opsd.data.rows import Row
from opsd.data.thoughts import final_part
from opsd.evaluate.answers import Completion, CompletionLog, Shard, claim, read_completions
from opsd.evaluate.result import grade_all, measure, powers, remarks, table
from opsd.evaluate.subject import Subject
from opsd.grading.grader import Grader
from opsd.report.evaluation_page import MAX_CHARACTERS, MAX_SAMPLES, page

ROOT = Path(__file__).parents[2]
PROBLEMS, SAMPLES = 6, 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluate")
    return write_model(directory / "model"), write_rows(directory / "rows.jsonl", ROWS[:PROBLEMS])


def arguments(files, output, *more):
    return [
        "eval", str(files[0]), "--benchmark", str(files[1]), "--output", str(output), "--samples",
        str(SAMPLES), "--temperature", "1", "--max-new-tokens", "6", "--batch-size", "4",
        *map(str, more),
    ]  # fmt: skip


def evaluate(files, output, *more) -> int:
    return main(arguments(files, output, *more))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """An evaluation that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate(files, output) == 0
    return output


def test_the_result_and_every_completion_are_written(files, whole):
    result = json.loads((whole / "result.json").read_text())
    assert (result["problems"], result["samples"]) == (PROBLEMS, SAMPLES)
    assert result["max_new_tokens"] == 6 and result["temperature"] == 1.0 and result["top_p"] == 1.0
    assert result["precision"] in ("fp32", "bf16") and result["seed"] == 0
    assert set(result["pass_at_k"]) == {"1", "2", "3"} and "math-verify" in result["versions"]
    answers = lines(whole / "answers.jsonl")
    assert [(line["problem"], line["sample"]) for line in answers] == [
        (p, s) for p in range(PROBLEMS) for s in range(SAMPLES)
    ]
    assert all(line["tokens"] <= 6 and line["answer"] for line in answers)
    assert len({line["completion"] for line in answers}) > PROBLEMS  # samples differ
    assert (whole / "report.html").read_text().startswith("<!doctype html>")


def completions(output: Path) -> dict:
    return {place: c.text for place, c in read_completions(output).items()}


def test_the_same_evaluation_is_not_sampled_again(files, whole, monkeypatch, capsys):
    monkeypatch.setattr("opsd.evaluate.subject.load_model", None)  # whoever calls it fails
    before = (whole / "completions-1-of-1.jsonl").read_bytes()
    assert evaluate(files, whole) == 0
    assert (whole / "completions-1-of-1.jsonl").read_bytes() == before
    assert f"avg@{SAMPLES}" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.62, 0.9])
def test_an_interrupted_evaluation_ends_as_if_it_had_not_been(files, whole, tmp_path, kept):
    """Cut anywhere, in the middle of a line and of a batch."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    path = output / "completions-1-of-1.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert evaluate(files, output) == 0
    places = [(line["problem"], line["sample"]) for line in lines(path)]
    assert len(places) == len(set(places)) == PROBLEMS * SAMPLES
    assert completions(output) == completions(whole)


def test_killed_in_the_middle(files, whole, tmp_path):
    output, slow = tmp_path / "out", ["--max-new-tokens", 40, "--batch-size", 1]
    command = [sys.executable, "-m", "opsd", *arguments(files, output, *slow)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    path, deadline = (
        output / "completions-1-of-1.jsonl",
        time.monotonic() + 300,
    )  # seconds, on a busy machine
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(read_completions(output))
    assert 0 < there < PROBLEMS * SAMPLES and not (output / "result.json").exists()
    assert evaluate(files, output, *slow) == 0
    answers = lines(output / "answers.jsonl")
    assert len(answers) == PROBLEMS * SAMPLES == len(lines(path))


def test_shards_are_merged_by_the_last(files, tmp_path, capsys):
    output = tmp_path / "out"
    assert evaluate(files, output, "--shard", "2/2") == 0
    assert "Shard 2 of 2 is done; 9 answers of other shards are missing" in capsys.readouterr().out
    assert not (output / "result.json").exists()
    assert {place[0] for place in read_completions(output)} == {1, 3, 5}
    assert evaluate(files, output, "--shard", "1/2") == 0
    assert f"avg@{SAMPLES}" in capsys.readouterr().out
    assert len(lines(output / "answers.jsonl")) == PROBLEMS * SAMPLES


def test_other_shards_go_on_where_fewer_or_more_began(files, tmp_path):
    output = tmp_path / "out"
    assert evaluate(files, output, "--shard", "1/3") == 0
    assert evaluate(files, output) == 0
    assert len(lines(output / "completions-1-of-1.jsonl")) == (PROBLEMS - 2) * SAMPLES
    assert len(lines(output / "answers.jsonl")) == PROBLEMS * SAMPLES


def test_ranks_of_a_launcher_are_shards(files, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert evaluate(files, output) == 0
    assert (output / "completions-2-of-2.jsonl").exists() and (output / "result.json").exists()


def test_another_evaluation_is_refused_by_what_differs(files, whole, tmp_path, capsys):
    assert evaluate(files, whole, "--seed", 1) == 1
    error = capsys.readouterr().err
    assert "holds another evaluation (seed 0, now 1)" in error
    model = tmp_path / "model"  # trained on under the same name
    shutil.copytree(files[0], model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert evaluate((model, files[1]), whole) == 1
    assert "holds another evaluation (model '" in capsys.readouterr().err
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").touch()
    assert evaluate(files, tmp_path / "occupied") == 1
    assert "neither an empty directory" in capsys.readouterr().err


def test_only_what_a_model_is_read_from_is_hashed(files, tmp_path):
    model = shutil.copytree(files[0], tmp_path / "model")
    before = Subject(str(model)).digest
    for name in ("other.safetensors", "pytorch_model.bin", "vocab.bin"):
        (model / name).touch()
        os.truncate(model / name, 10**12)  # a sparse file, which would be hashed for hours
    assert Subject(str(model)).digest == before


def test_the_default_directory_is_the_evaluations_own(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = [a for a in arguments(files, "out") if a not in ("--output", "out")]
    assert main(short) == 0 and main([*short, "--seed", "1"]) == 0
    names = sorted(path.name for path in Path("runs/eval").iterdir())
    assert len(names) == 2 and all(re.fullmatch(r"model-rows\.jsonl-\w{10}", n) for n in names)


def test_two_processes_do_not_write_one_file(tmp_path):
    with CompletionLog(tmp_path, Shard()), pytest.raises(UserError, match="another process"):
        CompletionLog(tmp_path, Shard())
    with CompletionLog(tmp_path, Shard()) as log:  # and the lock ends with its owner
        log.append([Completion(0, 0, "\ud800\x00é", 3, True)])
    assert read_completions(tmp_path)[0, 0].text == "\ud800\x00é"


def test_processes_that_start_together_share_the_directory(tmp_path):
    (tmp_path / ".evaluation.json.77.part").touch()  # the other one is just writing it
    claim(tmp_path, {"seed": 0}, {})
    assert json.loads((tmp_path / "evaluation.json").read_text())["identity"] == {"seed": 0}


def test_damaged_files_are_named(tmp_path):
    claim(tmp_path / "a", {"seed": 0}, {})
    (tmp_path / "a" / "completions-1-of-1.jsonl").write_text("nonsense\n")
    bad = []
    assert read_completions(tmp_path / "a", bad=bad) == {} and len(bad) == 1
    assert bad[0].startswith("a/completions-1-of-1.jsonl:1 (")
    (tmp_path / "a" / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json' is damaged"):
        claim(tmp_path / "a", {"seed": 0}, {})


def test_the_answer_of_a_damaged_line_is_sampled_again(files, whole, tmp_path, capsys):
    output = shutil.copytree(whole, tmp_path / "out")
    path = output / "completions-1-of-1.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(first.replace('"finished": ', '"finished": "no", "x": ') + "".join(rest))
    assert evaluate(files, output) == 0
    assert "out/completions-1-of-1.jsonl:1 (finished is 'no'" in capsys.readouterr().out
    assert completions(output) == completions(whole)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--top-p", "0"], "--top-p is 0.0: it must be above 0 and at most 1"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--thinking", "maybe"], "--thinking is 'maybe': it must be on, off or template"),
        (["--engine", "sglang"], "--engine is 'sglang': it must be generate or continuous or vllm"),
        (["--engine", "vllm_server"], "--server is missing"),
        (["--server", "http://a:1"], "--server is 'http://a:1': it is for --engine vllm_server"),
        (["--engine", "vllm_server", "--server", "a:1"], "--server is 'a:1': it must look like"),
        (["--gpu-memory", "1"], "--gpu-memory is 1.0: it must be above 0 and below 1"),
        (["--shard", "3/2"], "--shard is '3/2': it must be I/N"),
        (["--shard", "0/2"], "--shard is '0/2'"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--columns", "problem"], "--columns is 'problem': it must list OURS=THEIRS"),
        (["--columns", "question=problem"], "benchmark.columns: 'question' is not known"),
        (["--columns", "problem=question"], "has no column 'question'"),
        (["--revision", "main"], "benchmark.revision"),
        (["--thinking", "on"], "does not look at enable_thinking"),
        (["--prompt", "{{ problm }}"], "--prompt cannot be filled in"),
        (["--max-new-tokens", "99999"], "--max-new-tokens is 99999: the model's window leaves"),
    ],
)
def test_bad_arguments_stop_before_a_model_is_loaded(files, more, wanted, monkeypatch, capsys):
    monkeypatch.setattr("opsd.evaluate.subject.load_model", None)
    assert evaluate(files, "/nonexistent/out", *more) == 1
    error = capsys.readouterr().err
    assert wanted in error and len(error.splitlines()) == 1


def test_what_is_not_asked_is_left_to_the_convention():
    parse = parser().parse_args
    check(asked := parse(["eval", "m", "--benchmark", "aime25", "--columns", "problem = q"]), {})
    assert asked.samples is None and asked.columns == {"problem": "q"} and asked.shard == Shard()
    launched = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    check(asked := parse(["eval", "m", "--benchmark", "aime25"]), launched)
    assert (asked.shard, asked.ranked, asked.local_rank) == (Shard(4, 8), True, 1)
    with pytest.raises(UserError, match="RANK is 8"):
        check(parse(["eval", "m", "--benchmark", "x"]), {"RANK": "8", "WORLD_SIZE": "8"})


# --- figures ------------------------------------------------------------------------------------


def row(answer: str) -> Row:
    return Row("What?", "", answer, {})


def said(problem: int, *texts: str) -> list[Completion]:
    return [Completion(problem, s, text, len(text), True) for s, text in enumerate(texts)]


@pytest.fixture(scope="module")
def grader():
    with Grader(timeout=20) as grader:
        yield grader


def box(answer: str) -> str:
    return f"So it is \\boxed{{{answer}}}."


def test_figures_of_known_answers(grader):
    rows = [row("1"), row("\\frac{1}{2}"), row("3")]
    everything = [
        *said(0, box("1"), box("2"), box("2"), box("1"), box("1")),
        # the right answer in three forms outvotes nothing; the wrong one in two forms ties
        *said(1, box("1/2"), box("0.5"), box("1/3"), box("\\frac13"), "no idea"),
        *said(2, box("4"), box("5"), box("6"), box("7"), "none"),
    ]
    everything[-1] = Completion(2, 4, "cut \\boxed{3} and", 900, False)
    answers = grade_all(rows, everything[::-1], grader)  # in any order
    figures = measure(answers, grader)
    assert figures["accuracy"] == pytest.approx((3 / 5 + 2 / 5 + 1 / 5) / 3)
    assert figures["low"] < figures["accuracy"] < figures["high"]
    passes = {k: one["value"] for k, one in figures["pass_at_k"].items()}
    assert passes["2"] == pytest.approx((0.9 + 0.7 + 0.4) / 3) and list(passes) == [*"1245"]
    # 3 of 5; 2 against 2 (1/3 and \frac13 are one answer); 1 against four different ones: 1/5
    assert figures["majority"]["value"] == pytest.approx((1 + 1 / 2 + 1 / 5) / 3)
    assert figures["truncated"] == {"answers": 1, "correct": 1}
    assert figures["finished"] == {"answers": 14, "correct": 5} and figures["unanswered"] == 1
    shown = table(figures)
    assert [line[0] for line in shown] == [
        "avg@5", "maj@5", "pass@2", "pass@4", "pass@5"
    ]  # fmt: skip
    assert shown[0][1:] == ["0.400", f"{figures['low']:.3f} to {figures['high']:.3f}"]
    notes = " ".join(remarks({**figures, "max_new_tokens": 900, "left_out": 11}))
    assert "1 of 15 answers were cut off at 900 tokens, 1 of them right" in notes
    assert "1 of 15 answers have no \\boxed{}" in notes and "11 problems were left out" in notes


def test_a_box_in_a_thought_is_no_answer(grader):
    thought = "<think>maybe \\boxed{7}</think>I do not know."
    assert final_part(thought) == "I do not know." and final_part("plain") == "plain"
    answers = grade_all(
        [row("7")], said(0, thought, f"<think>\\boxed{{8}}</think>{box('7')}"), grader
    )
    assert [answer.grade.correct for answer in answers[0]] == [False, True]


def test_powers():
    assert powers(1) == [1] and powers(12) == [1, 2, 4, 8, 12] and powers(8) == [1, 2, 4, 8]


# --- the page -----------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a browser would make of it: tags, visible text, and whether all tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.seen, self.folds = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "details":
            self.folds.append("open" in dict(attributes))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.seen.append(data)


def test_the_page_shows_hostile_completions_and_runs_none(grader):
    hostile = '<script>alert(1)</script></div></details> &lt; "x" \x00\ud800\x1b[31m'
    long = "a" * (3 * MAX_CHARACTERS)
    rows = [row("1"), Row(hostile, "", "2", {})]
    given = [
        *said(0, *[box("1")] * 9, *[box("2")] * 2, long),
        *said(1, *[hostile] * 11, box("<b>2</b>")),
    ]
    given[8] = Completion(0, 8, "short but cut", 5, False)
    answers = grade_all(rows, given, grader)
    figures = measure(answers, grader)
    facts = {"model": hostile, "benchmark": "b", "max_new_tokens": 9, "thinking": None}
    text = page({**facts, **figures}, rows, answers)
    assert text.encode()  # no lone surrogates
    reader = Reader(text)
    seen = "".join(reader.seen)
    assert "script" not in reader.tags and "b" not in reader.tags and reader.open == []
    assert "alert(1)</script>" in seen and "\x00" not in text and "\x1b" not in text
    assert f"{2 * MAX_CHARACTERS:,} characters" in seen and len(text) < 8 * MAX_CHARACTERS
    assert len(reader.folds) == 2 * MAX_SAMPLES and "more answers are in answers.jsonl" in seen
    assert "short but cut" in seen and long[:100] in seen  # all kinds are kept
    assert reader.folds.count(False) == 2  # the long one and the one that was cut off
    assert "://" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
