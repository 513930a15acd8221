"""Run directories that somebody has changed: shown with what is missing told, or refused in a line.

Each goes through `opsd report`, `opsd compare` and the checks of `opsd train --resume`.
"""

import json
import math
import os
import resource
import shutil
import time
from html.parser import HTMLParser

import pytest
import yaml
from helpers.run_attacks import attack, copied, plain
from helpers.saved import sealed
from helpers.terminal import obeyed

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.saved_directory import new_directory
from opsd.config.load import load_config, parse_config, save_config
from opsd.data.rows import Row
from opsd.runs.directory import check_problems, claim_directory, last_checkpoint, locked, settle
from opsd.runs.log import RunLog
from opsd.runs.read import read_results
from opsd.training import replay as _imported_before_the_clock_starts  # noqa: F401

LOGS = ["metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "rollouts.jsonl"]
FILES = [*LOGS, "evaluations.jsonl", "summary.json", "config.yaml"]
SAVED = ["trainer_state.json", "optimizer.pt", "model.safetensors", "manifest.json"]
ROWS = {"data.source": [Row("1+1", "two", "2", {})]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with a checkpoint at 2 and 4."""
    run = tmp_path_factory.mktemp("good") / "run"
    run.mkdir()
    place = [{"step": s, "generated_tokens": 100 * s, "trained_tokens": 90 * s} for s in range(5)]
    token = {"text": "a", "divergence": 0.1, "student_probability": 0.5, "teacher": [["b", 0.9]]}
    texts = {"problem": "1+1", "solution": "two", "answer": "2", "completion": "3"}
    lines = {
        "metrics": [{**p, "method": "opsd", "seconds": 2.5, "loss": 0.5} for p in place[1:]],
        "evaluations": [
            {**p, "role": "student", "accuracy": 0.2 + s / 10, "problems": 50}
            for s, p in enumerate(place)
        ],
        "samples": [{**p, **texts, "correct": False, "tokens": [token] * 3} for p in place],
        "rollouts": [{**p, "problem": "1+1", "completion": "2", "reward": 1.0} for p in place[1:]],
    }  # fmt: skip
    for name, records in lines.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    summary = {"method": "opsd", "model": "m", "accuracy": {"before": 0.2, "after": 0.6},
               "generated_tokens": 400, "trained_tokens": 360, "seconds": 9.5,
               "peak_memory_bytes": 1000000, "versions": {"torch": "2"}, "machine": {}}  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    values = {"model": {"path": "m"}, "data": {"source": "d.jsonl"}, "output": {"dir": "run"}}
    save_config(parse_config(values | {"prompts": {"date": "2026-01-02"}}), run / "config.yaml")
    for step in (2, 4):
        state = {"global_step": step, "epoch": 0.5, "log_history": [{"loss": 0.5, "step": step}]}
        with new_directory(run / f"checkpoint-{step}", {"base": [0.5]}) as place:
            (place / "trainer_state.json").write_text(json.dumps(state))
            for name in ("optimizer.pt", "model.safetensors"):
                (place / name).write_bytes(b"weights" * 9)
    check_problems(run, ROWS, None)
    return run


OTHERS_KEYS = {
    "best_metric": [None, 0.5, "a"], "best_global_step": [2, None, -1],
    "is_local_process_zero": [1],
    "num_train_epochs": [1, 1.5, "3"], "stateful_callbacks": [{"TrainerControl": {}}, [], None],
    "total_flos": [1e308, 10**400, "0"], "trial_params": [{"a": 1}], "log_history": [[], None, [7]],
    "epoch": [None, 0, "0.5", 1e300, math.nan], "global_step": [4, 4.0, "4", 5, -4, None, 2**63],
    "max_steps": [0, -1, None], "save_steps": [0.5, None], "logging_steps": [None, []], "x": [{}],
    "train_batch_size": [None, 8], "eval_steps": [0.1], "best_model_checkpoint": ["/etc",
    7, "../.."],
}  # fmt: skip


def anothers_state(draw, checkpoint) -> None:
    """A trainer_state.json as another release of transformers writes it: keys more, less, other."""
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    for key in draw.sample(sorted(OTHERS_KEYS), draw.randint(1, 5)):
        state[key] = draw.choice(OTHERS_KEYS[key])
    if draw.random() < 0.3:
        del state[draw.choice(sorted(state))]
    file.write_text(json.dumps(state))


def beside(draw, run) -> None:
    """What a run directory has too many of: of other steps, backups, names that are no text."""
    names = [b"checkpoint-6", b"checkpoint-04", b"checkpoint-4.bak", b"checkpoint-\xff", b"\xff\n"]
    names += [b"checkpoint-" + b"9" * 200, b".checkpoint-8.x.part", b"checkpoint--1", b"model"]
    place = run / os.fsdecode(draw.choice([*names, b"checkpoint-\xd9\xa4", b"checkpoint-4 "]))
    how, whole = draw.randrange(5), run / "checkpoint-4"
    if how == 0 and all(map(plain, whole.iterdir())):  # a pipe cannot be copied
        shutil.copytree(whole, place)
    elif how <= 1:
        place.mkdir()
    elif how == 2:
        place.symlink_to(draw.choice(["checkpoint-4", ".", "/", "nowhere", "/dev/zero"]))
    elif how == 3:
        os.mkfifo(place)
    else:
        place.write_bytes(b"7")


class Page(HTMLParser):
    """What of a page could act: scripts that are not ours, handlers, addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.acts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.acts += [tag] if tag in ("img", "iframe", "object", "embed", "base", "form") else []
        for name, value in attributes:
            address = name in ("href", "src", "action") and not (value or "").startswith("#")
            if name.startswith("on") or (address and not (value or "").startswith("data:")):
                self.acts.append((tag, name, value))


@pytest.fixture
def bounded():
    """Little processor time and memory."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


def said_well(code: int, capsys) -> str:
    """What a command said: where it refuses, in one line; nothing that a terminal obeys."""
    shown = capsys.readouterr()
    assert code in (0, 1) and set(obeyed(shown.out + shown.err)) <= {"\n"}
    assert "Traceback" not in shown.err and len(shown.err) < 3000
    if code == 1:
        assert shown.err.startswith("opsd: ") and shown.err.count("\n") == 1
    return shown.err


def curve(path) -> list[tuple[float, float]] | None:
    """The curve that evaluations.jsonl tells whoever believes every line of it; None: no such."""
    found = {}
    try:
        *lines, last = path.read_bytes().decode(errors="replace").split("\n")
        try:
            json.loads(last)
        except ValueError:
            last = ""  # it was cut off
        for line in filter(str.strip, [*lines, last]):
            one = json.loads(line)
            found[one["step"], one.get("role", "student")] = one
            if one["step"] == 0 and one.get("generated_tokens") is None:
                one["generated_tokens"] = 0  # nothing was generated before the first step
        return sorted(
            (one["generated_tokens"], one["accuracy"])
            for (_, role), one in found.items()
            if role == "student"
        )
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
        return None


def outside(place):
    return {path: path.read_bytes() for path in (place / "outside").iterdir()}


def test_a_changed_run_is_shown_as_it_is(draw, run, tmp_path, capsys, bounded, monkeypatch):
    place = tmp_path / "place"
    if draw.random() < 0.9:  # a second each; what they draw is what the pages draw
        monkeypatch.setattr("opsd.report.curves_png.write_curves", lambda *_: None)
        monkeypatch.setattr("opsd.compare.page.write_comparison", lambda *_: None)
    changed = copied(run, place)
    attack(changed, FILES, draw)
    if draw.random() < 0.2:
        beside(draw, changed)
    secret = outside(place)
    evaluations = changed / "evaluations.jsonl"
    told = curve(evaluations) if plain(evaluations) else None
    code = main(["report", str(changed)])
    line = said_well(code, capsys)
    if code == 0:
        page = (changed / "report.html").read_text(encoding="utf-8")
        assert Page(page).acts == [] and "the secret" not in page
        results = read_results(changed)
        silent = not any("evaluations.jsonl" in said for said in results.troubles)
        if silent and evaluations.exists():
            assert [(p.x, p.accuracy.value) for p in results.runs[0].points] == told
        assert all(len(said) < 1500 for said in results.troubles)
    else:
        assert str(changed) in line
    code = main(["compare", str(changed), "--output", str(place / "out"), "--target", "0.45"])
    line = said_well(code, capsys)
    if code == 0:
        page = (place / "out" / "comparison.html").read_text(encoding="utf-8")
        assert Page(page).acts == [] and "the secret" not in page
        record = json.loads((place / "out" / "comparison.json").read_text())
        (method,) = record["methods"].values()
        if not any("evaluations.jsonl" in note for note in record["notes"]):
            assert [tuple(point) for point in method["runs"][0]["curve"]] == told
    assert outside(place) == secret


def test_a_changed_run_goes_on_as_it_was_or_not_at_all(draw, run, tmp_path, bounded):
    place = tmp_path / "place"
    changed = copied(run, place)
    config = load_config(run / "config.yaml", [f"output.dir={changed}"])
    save_config(config, changed / "config.yaml")
    names = [*LOGS, "config.yaml", "problems.json"]
    checkpoint = changed / "checkpoint-4"
    if draw.random() < 0.2:
        anothers_state(draw, checkpoint)
        sealed(checkpoint)
    elif draw.random() < 0.5:
        attack(checkpoint, SAVED, draw)
        # To seal a file of 10^12 bytes anew takes hours.
        if draw.random() < 0.5 and all(map(plain, checkpoint.iterdir())):
            try:
                sealed(checkpoint)
            except (UserError, AttributeError, OSError):
                pass
    else:
        attack(changed, names, draw)
    if draw.random() < 0.15:
        beside(draw, changed)
    secret = outside(place)
    before = {n: (changed / n).read_bytes() for n in names if plain(changed / n)}
    try:
        with locked(changed):
            settled = settle(config, changed, "fp32")
            found = claim_directory(changed, settled, True)
            check_problems(changed, ROWS, found)
            log = RunLog(changed, 4 if found else 0)
    except UserError as error:
        said = str(error)
        assert len(said) < 3000 and (str(changed) in said or "problems" in said), said
    else:
        assert found.name == "checkpoint-4" and settled.train == config.train.model_copy(
            update={"precision": "fp32"}
        )
        # A line of a log that is not there any more was torn, or of a later step.
        for name in LOGS:
            kept = (changed / name).read_bytes() if (changed / name).exists() else b""
            assert all(line in before[name].splitlines() for line in kept.splitlines())
        assert type(log.counters.generated_tokens) is int
    assert outside(place) == secret
    if found_later := [p for p in (changed / "checkpoint-2").iterdir()]:
        assert len(found_later) == 4 and last_checkpoint(run).name == "checkpoint-4"


def test_a_state_of_another_transformers_goes_on(run, tmp_path):
    """Its releases have added keys and will again; a missing one that is read is named."""
    changed = copied(run, tmp_path / "place")
    file = changed / "checkpoint-4" / "trainer_state.json"
    state = json.loads(file.read_text())
    newer = {
        "best_global_step": 2,
        "stateful_callbacks": {"TrainerControl": {"args": {}}},
        "x": [1],
    }
    for more in (newer, {"total_flos": 1e9, "trial_params": None, "is_hyper_param_search": False}):
        file.write_text(json.dumps(state | more))
        sealed(file.parent)
        assert last_checkpoint(changed).name == "checkpoint-4"
    file.write_text(json.dumps({"global_step": 4, "log_history": []}))
    sealed(file.parent)
    with pytest.raises(UserError, match=r"trainer_state\.json' is damaged \(epoch"):
        last_checkpoint(changed)


def test_what_is_told_of_a_run_is_in_both_pages(run, tmp_path, capsys):
    changed = copied(run, tmp_path / "place")
    with (changed / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 9, "role": "student", "accuracy": 7}\n')
    assert main(["report", str(changed)]) == 0
    assert "run/evaluations.jsonl:6 (accuracy is 7" in (changed / "report.html").read_text()
    assert main(["compare", str(changed), "--output", str(tmp_path / "out")]) == 0
    assert "run/evaluations.jsonl:6 (accuracy is 7" in capsys.readouterr().out
    config = yaml.safe_load((changed / "config.yaml").read_text())
    assert config["method"] == "opsd"


def test_a_last_line_without_its_end(run, tmp_path):
    """Cut off it is left out; whole, it gets its end before another is written, or is told."""
    changed = copied(run, tmp_path / "place")
    metrics, evaluations = changed / "metrics.jsonl", changed / "evaluations.jsonl"
    lines = metrics.read_bytes()
    metrics.write_bytes(lines[:-1])
    RunLog(changed, 4)
    assert metrics.read_bytes() == lines
    metrics.write_bytes(lines[:-2])
    assert len(RunLog(changed, 4).past) == 3
    with evaluations.open("a") as file:
        file.write('{"step": 5, "role": "student", "accuracy": 7}')
    troubles = read_results(changed).troubles
    assert ["evaluations.jsonl:6 (accuracy is 7" in said for said in troubles] == [True]
    with pytest.raises(UserError, match="is damaged in line 6 "):
        RunLog(changed, 4)


@pytest.mark.parametrize(
    "more",
    [
        {"accuracy": "0.5"}, {"accuracy": True}, {"accuracy": 1.5}, {"step": 4.0}, {"step": -1},
        {"problems": 0}, {"role": "nobody"}, {"generated_tokens": 1e19}, {"low": 7},
    ],
)  # fmt: skip
def test_a_value_of_another_type_or_beyond_its_bounds(more, run, tmp_path):
    changed = copied(run, tmp_path / "place")
    line = {"step": 4, "accuracy": 0.5, "generated_tokens": 400} | more
    with (changed / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    (trouble,) = read_results(changed).troubles
    assert trouble.startswith("run/evaluations.jsonl:6 (") and next(iter(more)) in trouble
    with pytest.raises(UserError, match=r"evaluations\.jsonl' is damaged in line 6"):
        RunLog(changed, 4)


def test_lines_that_are_too_long_and_links_are_not_read(run, tmp_path):
    changed = copied(run, tmp_path / "place")
    for name in ("metrics.jsonl", "config.yaml", "summary.json"):
        (changed / name).rename(changed.parent / name)
        (changed / name).symlink_to(changed.parent / name)
    (changed / "inside").symlink_to(run)
    with (changed / "samples.jsonl").open("a") as file:
        file.write(" " * (1 << 26) + "{}\n")
    found = read_results(changed)
    said = " ".join(found.troubles)
    assert found.config is None and found.runs[0].metrics == [] and not found.quickstart
    assert found.summary == {} and said.count("is a link, which is not followed") == 3
    assert "has more than 67,108,864 bytes in line 6" in said
