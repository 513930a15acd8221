"""The report: what it shows, what it leaves out; it loads nothing and runs no rollout's text."""

# ruff: noqa: RUF001 - dashes and minus signs for people to read are meant as such

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import jinja2
import pytest
from helpers.mutations import Clock

from opsd import report
from opsd.common.errors import UserError
from opsd.common.statistics import wilson_interval
from opsd.report import write_report
from opsd.report.charts import Chart, Series, smooth, thin, ticks
from opsd.report.render import environment
from opsd.report.rollouts import MAX_TOKENS, divergence_scale, sample_pairs, shade
from opsd.runs.read import Accuracy, read_results

ROOM = Path(report.__file__).parent
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluation(step, tokens, accuracy, role="student", **more):
    return {"step": step, "generated_tokens": tokens, "trained_tokens": tokens + 1000,
            "role": role, "accuracy": accuracy, "problems": 300, "samples": 1, **more}  # fmt: skip


def token(text, divergence=0.1, teacher=None):
    return {"text": text, "divergence": divergence, "student_probability": 0.5,
            "teacher": teacher or [[text, 0.9], ["?", 0.1]]}  # fmt: skip


def sample(step, problem="1+1", **more):
    return {"step": step, "problem": problem, "solution": "two, since 1+1=2", "answer": "2",
            "completion": "it is 2", "correct": step > 0,
            "tokens": [token("it"), token(" is", 0.8, [["s", 0.7]])], **more}  # fmt: skip


def make_run(path, method="opsd", accuracies=(0.3, 0.4, 0.5), samples=None):
    path.mkdir(parents=True)
    divergence = 0.2 if method == "opsd" else None
    write_lines(
        path / "metrics.jsonl",
        [{"step": s, "generated_tokens": 100 * s, "trained_tokens": 100 * s + 1000, "loss": 1 / s,
          "divergence": divergence, "student_entropy": 0.3, "rollout_length": 20.0 + s,
          "seconds": 2.0 * s} for s in range(1, 11)],
    )  # fmt: skip
    last = len(accuracies) - 1
    evaluations = [evaluation(5 * i, 500 * i, a) for i, a in enumerate(accuracies)]
    evaluations.append(evaluation(0, 0, 0.97, role="teacher"))
    write_lines(path / "evaluations.jsonl", evaluations)
    write_lines(path / "samples.jsonl", samples or [sample(0), sample(5 * last)])
    (path / "config.yaml").write_text(f"method: {method}\nmodel: {{path: some/model}}\n")


@pytest.fixture
def single(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    summary = {"method": "opsd", "model": "Qwen3-tiny", "accuracy": {"before": 0.3, "after": 0.5},
               "generated_tokens": 1000, "trained_tokens": 1000, "seconds": 65.0,
               "peak_memory_bytes": 1.2e9, "versions": {"torch": "2.13.0"},
               "machine": {"cores": 2}}  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.fixture
def quickstart(tmp_path):
    top = tmp_path / "quick"
    for method in ("sft", "opsd", "grpo"):
        make_run(top / method, method)
    (top / "base").mkdir()  # a model: no run
    methods = {m: {"accuracy": 0.5, "generated_tokens": 1000, "curve": [[0, 0.3], [1000, 0.5]]}
               for m in ("opsd", "grpo", "sft")}  # fmt: skip
    summary = {"model": "SmolLM2", "pretrained": {"accuracy": 0.08, "problems": 100},
               "base": {"accuracy": 0.3, "teacher_accuracy": 0.97}, "methods": methods,
               "problems": 300, "seconds": 500, "peak_memory_bytes": 4.3e9, "seed": 7}  # fmt: skip
    (top / "summary.json").write_text(json.dumps(summary))
    (top / "config.yaml").write_text("seed: 7\n")
    return top


class Reader(HTMLParser):
    """What a browser would make of the page: elements, attributes, the text people see, scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.scripts, self._inside = [], "", [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self._inside = name if name in ("script", "style") else None
        if name == "script":
            self.scripts.append("")

    def handle_endtag(self, name):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self.text += data

    def all(self, name, class_=None):
        return [
            attributes
            for found, attributes in self.elements
            if found == name and (not class_ or class_ in (attributes.get("class") or "").split())
        ]


def report_of(run_dir):
    paths = write_report(run_dir)
    return Reader(paths["report"].read_text(encoding="utf-8"))


def test_single_run_shows_result_charts_rollouts_and_what_ran(single):
    page = report_of(single)
    for text in ("30.0 %", "50.0 %", "+20.0 points", "1,000", "1 min 05 s", "1.2 GB", "97.0 %",
                 "Qwen3-tiny", "300 held-out problems", "torch", "2.13.0", "some/model",
                 "two, since 1+1=2", "✗ wrong", "✓ correct", "generated tokens"):  # fmt: skip
        assert text in page.text, text
    names = {attributes["data-chart"] for attributes in page.all("svg", "chart")}
    assert {
        "accuracy", "panel-divergence", "panel-student_entropy", "panel-rollout_length"
    } <= names  # fmt: skip
    assert "no summary.json" not in page.text


def test_wilson_intervals_are_in_the_table_and_drawn_as_a_band(single):
    low, high = wilson_interval(150, 300)
    page = report_of(single)
    assert f"{100 * low:.1f}–{100 * high:.1f}" in page.text
    wide = [path for path in page.all("path", "band")]
    assert len(wide) == 2  # one run, drawn for wide and for narrow screens
    assert wide[0]["d"].count("L") == 5 and wide[0]["d"].endswith("Z")  # 3 upper, 3 lower points


def test_intervals_of_the_run_go_before_our_own(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    write_lines(run / "evaluations.jsonl", [evaluation(0, 0, 0.3, low=0.111, high=0.777)])
    assert read_results(run).base == Accuracy(0.3, 0.111, 0.777)


def test_quickstart_compares_methods_and_says_what_the_sft_axis_is(quickstart):
    results = read_results(quickstart)
    assert [run.method for run in results.runs] == ["opsd", "grpo", "sft"]
    assert [point.x for point in results.runs[0].points] == [0, 500, 1000]
    assert [point.x for point in results.runs[2].points] == [0, 1000, 1500, 2000]  # trained tokens
    page = report_of(quickstart)
    for text in ("SmolLM2", "seed 7", "pretrained", "8.0 %", "teacher", "SFT: trained tokens",
                 "(trained)", "recorded no divergence"):  # fmt: skip
        assert text in page.text, text
    assert page.all("path", "series-grpo") and page.all("path", "series-sft")
    assert {"reference"} <= set(page.all("line", "ref-pretrained")[0]["class"].split())


def test_the_cold_start_is_not_compared_with_the_methods(quickstart):
    make_run(quickstart / "cold_start", "sft")
    page = report_of(quickstart)
    header = page.text[: page.text.index("Result")]
    assert "OPSD, GRPO, SFT" in header and "Cold start" not in header
    assert not page.all("path", "series-cold_start")
    assert "Cold start" in page.text  # its time, among the others


def test_quickstart_in_progress_needs_no_summary(quickstart):
    (quickstart / "summary.json").unlink()
    (quickstart / "grpo" / "samples.jsonl").unlink()
    page = report_of(quickstart)
    assert "no summary.json yet" in page.text and "step 10" in page.text
    assert "97.0 %" in page.text  # the teacher's accuracy, from evaluations.jsonl


def test_finished_runs_in_one_directory_are_no_quickstart_in_progress(tmp_path):
    for name in ("first", "second"):
        make_run(tmp_path / name)
        (tmp_path / name / "summary.json").write_text(json.dumps({"method": "opsd"}))
    page = report_of(tmp_path)
    assert "no summary.json yet" not in page.text
    assert "opsd train · first, second" in page.text
    (tmp_path / "second" / "summary.json").unlink()
    assert "no summary.json yet" in report_of(tmp_path).text


def test_summary_alone_still_gives_the_curves(quickstart, tmp_path):
    moved = tmp_path / "only-summary"
    moved.mkdir()
    (quickstart / "summary.json").rename(moved / "summary.json")
    assert [p.x for p in read_results(moved).runs[0].points] == [0, 1000]
    assert "No sample rollouts were written." in report_of(moved).text


def test_hostile_text_is_shown_and_never_runs(tmp_path):
    run = tmp_path / "run"
    hostile = [sample(s, problem=EVIL, solution=EVIL, answer=EVIL, completion=EVIL,
                      tokens=[token(EVIL, 0.5, [[EVIL, 0.9]]), token("\n"), token("")])
               for s in (0, 10)]  # fmt: skip
    make_run(run, samples=hostile)
    (run / "config.yaml").write_text(f"method: opsd\nmodel: '{EVIL}'\n")
    (run / "summary.json").write_text(
        json.dumps({"method": EVIL, "model": EVIL, "versions": {EVIL: EVIL}, "machine": EVIL})
    )
    page = report_of(run)
    assert len(page.scripts) == 2  # the data and report.js
    assert "alert(" not in page.scripts[1]
    json.loads(page.scripts[0])
    assert not page.all("img")
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], name
    assert page.text.count(EVIL) >= 8
    shown = page.all("span", "t")[1:]  # without the legend's
    assert json.loads(shown[0]["data-teacher"]) == [[EVIL, 0.9]]
    assert shown[0]["data-text"] == EVIL


def rendered(template, **values):
    return environment().from_string(template).render(**values)


def test_embedded_json_cannot_leave_its_element_and_has_no_nan():
    text = rendered("<script>{{ data|tojson }}</script>", data=["</script>"])
    assert text.count("</") == 1
    assert json.loads(text.removeprefix("<script>").removesuffix("</script>")) == ["</script>"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        rendered("{{ data|tojson }}", data=[float("nan")])


def test_templates_escape_and_clean_what_is_put_in_and_know_all_names():
    shown = rendered('<p title="{{ x }}">{{ y }}{{ z }}</p>', x='"<', y="\x1b\ud800a\r\nb", z=None)
    assert shown == '<p title="&#34;&lt;">\ufffd\ufffda\nb</p>'
    with pytest.raises(jinja2.UndefinedError, match="'x' is undefined"):
        rendered("{{ x }}")


def test_the_page_allows_its_own_script_only(single):
    page = report_of(single)
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}';" in policy


def test_the_page_loads_nothing(quickstart):
    page = report_of(quickstart)
    raw = (quickstart / "report.html").read_text()
    assert not re.search(r"https?://|//cdn|@import|url\(|fetch\(|XMLHttpRequest|import\(", raw)
    for name, attributes in page.elements:
        assert name not in ("link", "img", "iframe", "object", "embed")
        assert not {"src", "href", "srcset", "action"} & set(attributes), name
    assert page.all("meta")[1]["content"].startswith("width=device-width")
    assert "prefers-color-scheme: dark" in raw


def test_the_style_names_only_what_the_page_has():
    css = re.sub(r"\{[^{}]*\}", "{}", (ROOM / "templates" / "report.css").read_text())
    sources = [path for path in ROOM.rglob("*.*") if path.suffix in (".py", ".html", ".js")]
    text = " ".join(path.read_text() for path in sources)
    for name in set(re.findall(r"\.([a-z][\w-]*)", css)):
        known = re.sub(r"^(series|ref)-\w+$", r"\1-{{", name)  # of a method; filled in
        known = re.sub(r"^d[1-9]$", "d{{", known)  # of a shade
        assert known in text if "{" in known else re.search(rf"\b{known}\b", text), name


def test_what_a_step_costs_and_what_has_collapsed(single):
    lines = [
        {"step": s, "method": "opsd", "loss": 1.0, "pass_at_k": 0.25, "correct_fraction": 0.125,
         "rollout_seconds": 3.0 * s, "backward_seconds": 1.0 * s, "rollout_peak_bytes": 1e9 * s,
         "loss_seconds": 0.002 * s}
        for s in (1, 2, 3)
    ]  # fmt: skip
    lines[1]["collapse"] = ["entropy", "inverted_gradient"]
    lines[2]["collapse"] = []
    write_lines(single / "metrics.jsonl", lines)
    text = " ".join(report_of(single).text.split())
    assert "What a step costs" in text and "rollout 6 s 75.0 % 3 GB" in spaced(single)
    assert "loss 4 ms 0.0 %" in spaced(single)
    assert "backward 2 s 25.0 %" in spaced(single) and "teacher 0" not in spaced(single)
    assert "OPSD, step 2: collapse? The student's entropy has fallen away" in text
    assert "inverts the gradient" in text and "step 3: collapse" not in text
    assert "Problems with a right rollout (pass@k)" in text and "Rollouts that are right" in text


def spaced(run) -> str:
    """The page's table cells as words."""
    page = (run / "report.html").read_text()
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_a_run_that_measured_no_parts_shows_no_costs(single):
    text = report_of(single).text
    assert "What a step costs" not in text and "collapse" not in text


def test_half_written_last_line_is_quietly_left_out_and_a_bad_one_is_mentioned(single):
    metrics = single / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 11, "gener')
    results = read_results(single)
    assert len(results.runs[0].metrics) == 10 and results.troubles == []
    metrics.write_text("not json\n" + whole)
    results = read_results(single)
    assert len(results.runs[0].metrics) == 10
    (trouble,) = results.troubles
    assert trouble.startswith("run/metrics.jsonl:1 (JSONDecodeError: ") and "left out" in trouble
    assert "run/metrics.jsonl:1 (JSONDecodeError" in report_of(single).text


@pytest.mark.parametrize(
    "missing, sentence",
    [
        ("metrics.jsonl", "No steps were written to metrics.jsonl."),
        ("evaluations.jsonl", "No evaluation of the student was written."),
        ("samples.jsonl", "No sample rollouts were written."),
        ("config.yaml", "There is no config.yaml in this directory."),
        ("summary.json", "There is no summary.json yet"),
    ],
)
def test_a_missing_file_leaves_its_part_out_and_says_so(single, missing, sentence):
    assert sentence not in report_of(single).text
    (single / missing).unlink()
    assert sentence in report_of(single).text


@pytest.mark.parametrize("keep", ["metrics.jsonl", "evaluations.jsonl", "samples.jsonl"])
def test_any_one_file_is_enough(single, keep):
    for path in single.iterdir():
        if path.name != keep:
            path.unlink()
    paths = write_report(single)
    assert paths["curves"].stat().st_size > 5000


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model": null, "methods": 3, "base": []}'])
def test_a_broken_summary_is_no_crash(single, content):
    (single / "summary.json").write_text(content)
    assert "50.0 %" in report_of(single).text


def test_strange_values_are_no_crash(single):
    with (single / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": NaN, "divergence": Infinity, "student_entropy": "x"}\n')
        file.write('{"step": null}\n{}\n')
    with (single / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 10, "accuracy": null}\n{"role": "student", "accuracy": 0.9}\n')
    with (single / "samples.jsonl").open("a") as file:
        file.write('{"step": 10, "problem": null, "tokens": [null, {"teacher": [["a"]]}]}\n')
    page = report_of(single)
    assert "NaN" not in page.scripts[0] and "nan" not in page.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml"])
def test_a_pipe_or_a_device_is_not_waited_for(single, name):
    """Of a directory that somebody has sent."""
    (single / name).unlink()
    os.mkfifo(single / name)
    with Clock():
        assert "50.0 %" in report_of(single).text
    (single / name).unlink()
    (single / name).symlink_to("/dev/zero")
    with Clock():
        assert "50.0 %" in report_of(single).text


def test_a_run_evaluated_once_has_no_after(single):
    write_lines(single / "evaluations.jsonl", [evaluation(0, 0, 0.3)])
    page = report_of(single)
    assert "Held-out accuracy at the start" in page.text and " points" not in page.text
    assert page.all("line", "whisker")


def test_no_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        write_report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_curves_are_a_picture_of_sensible_size_and_can_be_written_again(quickstart):
    from PIL import Image

    before = sorted(path.name for path in quickstart.iterdir())
    for _ in range(2):
        paths = write_report(quickstart)
    assert set(paths) == {"report", "curves"}
    with Image.open(paths["curves"]) as image:
        assert image.format == "PNG" and image.size == (2000, 840)
        colours = image.convert("RGB").getcolors(2**22)
    drawn = {colour for count, colour in colours if count > 300}
    # the three methods' lines and the white paper
    assert {(11, 97, 164), (179, 71, 0), (23, 128, 61), (255, 255, 255)} <= drawn
    assert paths["curves"].stat().st_size < 400_000
    after = sorted(path.name for path in quickstart.iterdir())
    assert after == sorted([*before, "report.html", "curves.png"])  # no half-written files left


def test_importing_the_report_imports_neither_torch_nor_matplotlib():
    code = "import sys, opsd.report; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_before_and_after_are_paired_by_problem():
    samples = [sample(0, "a", completion="a0"), sample(5, "a", completion="mid"),
               sample(9, "b", completion="b9"), sample(9, "a", completion="a9")]  # fmt: skip
    pairs = [[s and s["completion"] for s in pair] for pair in sample_pairs(samples)]
    assert pairs == [["a0", "a9"], [None, "b9"]]
    assert [pair[1] for pair in sample_pairs(samples[:1])] == [None]


def test_what_a_resumed_run_wrote_again_counts_once(single):
    with (single / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "generated_tokens": 1000, "seconds": 44.0}) + "\n")
    with (single / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(10, 1000, 0.6)) + "\n")
    with (single / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample(10, completion="again")) + "\n")
    run = read_results(single).runs[0]
    assert [record["step"] for record in run.metrics] == list(range(1, 11))
    assert [point.accuracy.value for point in run.points] == [0.3, 0.4, 0.6]
    assert [after["completion"] for _, after in sample_pairs(run.samples)] == ["again"]


def test_tokens_are_shaded_marked_and_keep_their_newlines(tmp_path):
    run = tmp_path / "run"
    tokens = [token("a", 0.0), token("\n", 0.25), token("b", 1.0, [["c", 0.9]]), token("", 1.0)]
    make_run(run, samples=[sample(0, tokens=tokens)])
    page = report_of(run)
    shown = page.all("span", "t")[1:]
    assert [a["class"] for a in shown] == ["t d0", "t d4", "t d9 other", "t d9"]
    assert [a["tabindex"] for a in shown] == ["0", "-1", "-1", "-1"]
    assert "⏎\n" in page.text and "∅" in page.text
    assert shade(-1.0, 1.0) == 0 and shade(99.0, 1.0) == 9
    assert divergence_scale([{"tokens": [{"text": "x"}]}]) is None


def test_a_very_long_rollout_is_cut_and_says_so(tmp_path):
    run = tmp_path / "run"
    make_run(run, samples=[sample(0, tokens=[token("x")] * (MAX_TOKENS + 5))])
    page = report_of(run)
    assert f"{MAX_TOKENS + 5} tokens" in page.text
    assert f"the first {MAX_TOKENS} are shown" in page.text
    assert len(page.all("span", "t")) == MAX_TOKENS + 1  # and the legend's


def test_rollouts_without_token_details_show_their_text(tmp_path):
    run = tmp_path / "run"
    plain = {"step": 0, "problem": "p", "solution": "s", "answer": "a", "completion": "just <text>"}
    make_run(run, samples=[plain])
    page = report_of(run)
    assert "just <text>" in page.text and "Divergence, nats" not in page.text


@pytest.mark.parametrize(
    "low, high",
    [(0, 1), (0.137, 0.1371), (0, 26_000), (5, 5), (-3, 4), (0, 0), (1e-30, 1.1e-30), (0, 4e18)],
)
def test_ticks_are_round_and_cover_the_range(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 12
    steps = {round((b - a) / (found[1] - found[0]), 5) for a, b in pairwise(found)}
    assert steps == {1.0}


@pytest.mark.parametrize(
    "points", [[(0, 1.0)], [(0, 0.0), (1, 0.0)], [(1, 1e-9), (2, 5e6)], [(3, -1.0), (4, 1.0)]]
)
def test_points_are_drawn_inside_the_chart(points):
    chart = Chart("x", "t", "step", "y", [Series("opsd", "OPSD", points)], large=True, share=True)
    drawn = environment().get_template("charts.html").module.draw(chart, 300, 200)
    dots = Reader(drawn).all("circle")
    assert len(dots) == len(points)
    for dot in dots:
        assert 0 <= float(dot["cx"]) <= 300 and 0 <= float(dot["cy"]) <= 160.5


def test_thin_keeps_the_ends_and_smooth_keeps_a_constant():
    points = [(i, 2.0) for i in range(1234)]
    assert thin(points)[0] == points[0] and thin(points)[-1] == points[-1]
    assert len(thin(points)) == 500
    assert smooth(points) == points
    assert smooth([(0, 0.0), (1, 3.0), (2, 0.0)])[1] == (1, 1.0)
