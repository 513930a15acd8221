"""Pages run nothing that they show: the report, the comparison, the evaluation."""

import json
import os
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import yaml
from helpers.training_cases import ROWS

from opsd.compare.comparison import compare
from opsd.compare.page import page as compare_page
from opsd.evaluate.answers import Completion
from opsd.evaluate.result import grade_all, measure
from opsd.grading.grader import Grader
from opsd.report import write_report
from opsd.report.evaluation_page import page as evaluation_page

# A browser sets the page's title, and with it its DOM, if it runs any of these.

RUN = "document.title='it has run'"
HOSTILE = r"$\frac_{$ "  # nor may matplotlib take it for a formula
HOSTILE += (
    f'</script><script>{RUN}</script>"><img src=x onerror={RUN}><svg onload={RUN}>'
    f"</textarea></style></title>'-{RUN}-'<!--<script>\u2028{{{{ {RUN} }}}}"
)


def hostile_pages(directory: Path) -> list[Path]:
    """The report, the comparison and the evaluation of a run in which every text is HOSTILE."""
    run = directory / "run"
    run.mkdir()
    token = {"text": HOSTILE, "divergence": 0.5, "student_probability": 0.5}
    shown = {"problem": HOSTILE, "solution": HOSTILE, "answer": HOSTILE, "completion": HOSTILE}
    place = [{"step": s, "generated_tokens": 9 * s, "trained_tokens": 9 * s} for s in (0, 1)]
    lines = {
        "samples": [
            {**p, **shown, "method": HOSTILE, "correct": True,
             "tokens": [{**token, "teacher": [[HOSTILE, 0.9]]}]} for p in place
        ],
        "evaluations": [
            {**p, "role": "student", "accuracy": 0.2 + 0.1 * p["step"], "problems": 9}
            for p in place
        ],
        "metrics": [{**place[1], "loss": 1.0, "seconds": 1.0, "method": HOSTILE}],
    }  # fmt: skip
    for name, records in lines.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    facts = {"model": HOSTILE, "machine": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    (run / "summary.json").write_text(json.dumps({"method": "opsd", **facts}))
    (run / "config.yaml").write_text(yaml.safe_dump({"method": HOSTILE, "model": HOSTILE}))
    pages = [Path(write_report(run)["report"])]
    (run / "summary.json").write_text(json.dumps({"method": HOSTILE, **facts}))
    pages.append(directory / "comparison.html")
    pages[-1].write_text(compare_page(compare([run], target=0.25)))
    rows = [ROWS[0].__class__(HOSTILE, HOSTILE, "2", {"problem": HOSTILE})]
    with Grader() as grader:
        answers = grade_all(rows, [Completion(0, 0, HOSTILE, 5, True)], grader)
        figures = measure(answers, grader)
    facts = {"model": HOSTILE, "benchmark": HOSTILE, "max_new_tokens": 9, "thinking": None}
    pages.append(directory / "evaluation.html")
    pages[-1].write_text(evaluation_page({**facts, **figures}, rows, answers))
    return pages


class Scripts(HTMLParser):
    """The scripts and event handlers of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.inside = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.found += [f"{key}={value}" for key, value in attributes if key.startswith("on")]
        self.found += [tag] if tag in ("img", "iframe", "object", "embed", "base") else []

    def handle_data(self, data):
        if self.inside == "script" and not data.lstrip().startswith(("{", "[")):
            self.found.append(data)


def test_pages_run_nothing_that_they_show(tmp_path):
    for path in hostile_pages(tmp_path):
        text = path.read_text(encoding="utf-8")
        assert "it has run" in text  # it is shown
        for script in Scripts(text).found:
            assert "it has run" not in script and not script.startswith("on"), path


if "OPSD_BROWSER" in os.environ:  # asked for by name, as SECURITY.md says: not everybody has one

    def test_pages_run_nothing_in_a_browser(tmp_path):
        """OPSD_BROWSER=chromium pytest tests/security/test_pages.py -k browser"""

        def title(path: Path) -> str:
            command = [os.environ["OPSD_BROWSER"], "--headless", "--no-sandbox", "--disable-gpu"]
            command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{path}"]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            return shown.stdout.partition("<title>")[2].partition("</title>")[0]

        trap = tmp_path / "trap.html"
        trap.write_text(f"<title>t</title><p>{HOSTILE}")
        assert title(trap) == "it has run"  # this browser would
        for path in hostile_pages(tmp_path):
            assert title(path) != "it has run", path
