"""`opsd compare` of configs and of study files: what it runs, and what it does not run again."""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import psutil
import pytest
import yaml

from opsd.cli.compare import check_settings, is_study
from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.compare import study as studies
from opsd.compare.study import Job, load_study, run_jobs, study_jobs, train_jobs
from opsd.compare.study_page import study_notes, study_page
from opsd.config.load import save_config
from opsd.data.solution_styles import SOLUTION_STYLES, SolutionStyle
from opsd.quickstart import chain_sum
from opsd.quickstart import tiny_model as tiny
from opsd.quickstart.recipe import repeated
from opsd.report import curves_png as curves

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """Runs a study's jobs in this process, on a base of three steps, with few worksheets and short
    rollouts, and without the plots, which other tests look at; returns what was run.
    """
    ran = []
    from opsd.quickstart import tiny_recipe

    short = replace(tiny.BaseTraining(), steps=3, batch_size=8)
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny.cached_base, "__defaults__", (short,))
    monkeypatch.setattr(tiny, "BaseTraining", lambda: short)
    monkeypatch.setattr(tiny_recipe, "TEACHER", replace(short, teacher_share=0.0))
    monkeypatch.setattr(tiny_recipe, "TRAIN_ROWS", 16)
    monkeypatch.setitem(tiny_recipe.SECTIONS["train"], "problems_per_step", 8)
    monkeypatch.setitem(tiny_recipe.SECTIONS["rollout"], "max_new_tokens", 8)
    monkeypatch.setattr(curves, "write_curves", lambda results, file: file.write(b""))

    class Process:
        def __init__(self, job):
            ran.append(job.directory)
            self.returncode = main(job.command)

        def poll(self):
            return self.returncode

    monkeypatch.setattr(studies, "_start", lambda job, *_: Process(job))
    return ran


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_study_runs_each_variant_and_seed_once(tmp_path, in_process, capsys):
    file = write(
        tmp_path / "study.yaml",
        quickstart="tiny",
        methods=["opsd", "sft", "distill"],
        seeds=[0, 1],
        solutions=[2, "endless"],
        problems=8,
        steps=1,
        baseline="sft",
    )
    output = tmp_path / "out"
    assert main(["compare", str(file), "--output", str(output)]) == 0
    assert [str(path.relative_to(output)) for path in in_process] == [
        "2-words/seed-0",
        "2-words/seed-1",
        "endless-words/seed-0",
        "endless-words/seed-1",
    ]
    text = (in_process[0] / "base" / "train.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["problem"] for row in rows}) == 2 and len(rows) == 16
    teacher = yaml.safe_load((in_process[0] / "distill" / "config.yaml").read_text())["teacher"]
    assert teacher["policy"] == "model" and (Path(teacher["path"]) / "config.json").is_file()
    record = json.loads((output / "study.json").read_text())
    assert set(record) == {"2-words", "endless-words"}
    assert set(record["2-words"]["methods"]) == {"opsd", "sft", "distill"}
    for name in record:
        assert (output / name / "comparison.html").is_file()
        assert f'href="{name}/comparison.html"' in (output / "study.html").read_text()
    assert "endless" in capsys.readouterr().out
    # Again: only what is missing.
    cut_off = output / "endless-words" / "seed-1"
    for path in (cut_off, cut_off / "distill"):
        (path / "summary.json").unlink()
    trained = [cut_off / method / "metrics.jsonl" for method in ("opsd", "sft", "distill")]
    before = [path.stat().st_mtime_ns for path in trained]
    assert main(["compare", str(file), "--output", str(output)]) == 0
    assert len(in_process) == 5 and in_process[-1].name == "seed-1"
    after = [path.stat().st_mtime_ns for path in trained]
    assert after[:2] == before[:2] and after[2] > before[2]


def test_a_study_of_variants(tmp_path, in_process, capsys):
    file = write(
        tmp_path / "study.yaml",
        quickstart="tiny",
        methods=["opsd"],
        seeds=[0],
        problems=8,
        steps=1,
        settings={"eval": {"every": 1}},
        variants={"forward": {}, "sampled": {"opsd": {"loss": {"divergence": "sampled_token"}}}},
    )
    output = tmp_path / "out"
    assert main(["compare", str(file), "--output", str(output)]) == 0
    configs = [
        yaml.safe_load((output / name / "seed-0" / "opsd" / "config.yaml").read_text())
        for name in ("forward", "sampled")
    ]
    assert [config["loss"]["divergence"] for config in configs] == ["forward_kl", "sampled_token"]
    assert all(config["eval"]["every"] == 1 for config in configs)
    assert "sampled" in capsys.readouterr().out
    # Other settings are no part of it; another method is added to what is there.
    asked = yaml.safe_load(file.read_text())
    write(file, **asked | {"settings": {"eval": {"every": 2}}})
    assert main(["compare", str(file), "--output", str(output)]) == 1
    said = "seed-0' was begun with overrides ['eval.every=1'], not ['eval.every=2']; choose"
    assert said in capsys.readouterr().err
    write(file, **asked | {"methods": ["opsd", "sft"]})
    assert main(["compare", str(file), "--output", str(output)]) == 0
    assert len(in_process) == 4
    record = json.loads((output / "study.json").read_text())
    assert set(record["forward"]["methods"]) == {"opsd", "sft"}


def test_configs_are_run_with_each_seed(tmp_path, monkeypatch):
    values = {
        "model": {"path": "m"},
        "data": {"source": "d.jsonl"},
        "output": {"dir": "elsewhere"},
    }
    paths = [write(tmp_path / f"{name}.yaml", **values) for name in ("a", "b")]
    jobs = train_jobs(paths, [3, 5], tmp_path / "out", tokens=1000)
    assert [job.directory.name for job in jobs] == ["a-3", "a-5", "b-3", "b-5"]
    own = [f"output.dir={tmp_path}/out/b-5", "train.token_budget=1000"]
    assert jobs[3].arguments == ["train", str(paths[1]), "train.seed=5", *own]
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda args, **more: started.append(args))
    jobs[3].directory.mkdir(parents=True)
    studies._start(jobs[3], 1, 0)
    studies._start(jobs[0], 1, 0)
    assert started[0][-2:] == ["--resume", "--start-over"] and started[1][-1] != "--start-over"
    # A finished run is one of these settings, and as long as is asked.
    jobs[0].directory.mkdir()
    save_config(jobs[0].config, jobs[0].directory / "config.yaml")
    (jobs[0].directory / "summary.json").write_text("{}")
    assert [job.finished for job in jobs] == [True, False, False, False]
    assert not train_jobs(paths, [3, 5], tmp_path / "out", tokens=2000)[0].finished
    write(paths[0], **values, train={"learning_rate": 1e-3})
    with pytest.raises(UserError, match=r"another config .*learning_rate"):
        train_jobs(paths, [3, 5], tmp_path / "out", tokens=1000)


def test_runs_are_spread_over_gpus(tmp_path, monkeypatch):
    """One a GPU at a time, and a GPU that is free again is the next run's."""
    from opsd.common.display import Display

    placed, ends = [], iter([None, 0, 0, 0])  # what the first four polls say

    class Process:
        returncode = 0

        def __init__(self, job, gpu):
            placed.append((job.directory.name, gpu))
            job.directory.mkdir(parents=True)
            (job.directory / "summary.json").touch()

        def poll(self):
            return next(ends)

        def wait(self):
            raise AssertionError("all have ended")

    monkeypatch.setattr(studies, "_start", lambda job, threads, watched, gpu: Process(job, gpu))
    jobs = [Job(tmp_path / name, []) for name in "abc"]
    run_jobs(jobs, Display(), gpus=["3", "5"])
    assert placed == [("a", "3"), ("b", "5"), ("c", "5")]


def test_a_failed_run_is_named_with_its_log(tmp_path, monkeypatch):
    from opsd.common import display

    monkeypatch.setattr(display, "PLAIN_INTERVAL", 0.0)
    job = Job(tmp_path / "run", ["train", str(tmp_path / "missing.yaml")])
    shown = StringIO()
    with pytest.raises(UserError, match=r"run: the run failed; see .*run\.log"):
        run_jobs([job], display.Display(file=shown))
    assert f", {tmp_path}/run.log for 0.0 s" in shown.getvalue()  # from its start
    assert "no such file" in studies.log_of(job).read_text()


WAITING = """
import subprocess, sys
from pathlib import Path
from opsd.compare import study
from opsd.common.display import Display
from opsd.common.ending import Interruption

def sleeper(*_):
    return subprocess.Popen(["sh", "-c", "sleep 0.5; echo $$; exec sleep 60"])

study._start = sleeper
with Interruption():
    study.run_jobs([study.Job(Path(sys.argv[1]), [])], Display(quiet=True))
"""


def test_sigterm_ends_the_runs(tmp_path):
    command = [sys.executable, "-c", WAITING, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        run = int(process.stdout.readline())
        process.terminate()
        assert process.wait(timeout=120) == 1  # by the exception, as with Ctrl-C
    with pytest.raises(ProcessLookupError):
        os.kill(run, 0)


KILLED = """
import os, sys
from pathlib import Path
from opsd.compare import study
from opsd.common.display import Display

os.environ["PYTHONPATH"] = os.pathsep.join([sys.argv[1], os.environ.get("PYTHONPATH", "")])
started = study._start
def tell(*arguments):
    process = started(*arguments)
    print(process.pid, flush=True)
    return process

study._start = tell
study.run_jobs([study.Job(Path(sys.argv[1], "run"), ["doctor"])], Display(quiet=True))
"""


def test_a_killed_study_leaves_no_run_behind(tmp_path):
    """Its run is busy with a torch that takes a minute to import."""
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        run = psutil.Process(int(process.stdout.readline()))
        time.sleep(2)
        assert run.is_running()
        process.kill()
    psutil.wait_procs([run], timeout=120)
    assert not run.is_running()


HELD = """
import sys, time
from pathlib import Path
from opsd.runs.directory import locked

sys.argv = ["opsd", "quickstart", "--tiny", "\x1b[2J"]
with locked(Path(sys.orig_argv[-1]), "--output", "quickstart.json"):
    print(flush=True)
    time.sleep(60)
"""


def test_a_study_says_who_has_a_directory_of_its_runs(tmp_path, monkeypatch, capsys):
    """As a killed study's run, which saves its last step before it ends."""
    monkeypatch.setattr("opsd.compare.study._start", None)
    (tmp_path / "s.yaml").write_text("quickstart: tiny\nseeds: [0]\nmethods: [opsd]\n")
    directory = tmp_path / "out" / "endless-words" / "seed-0"
    directory.mkdir(parents=True)
    command = [sys.executable, "-c", HELD, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "\n"
            assert (
                main(["compare", str(tmp_path / "s.yaml"), "--output", str(tmp_path / "out")]) == 1
            )
            said = capsys.readouterr().err
            assert f"seed-0': process {other.pid} is training there, on {platform.node()} " in said
            assert (
                "by `opsd quickstart --tiny '\\x1b[2J'`; wait for it" in said and "\x1b" not in said
            )
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "quickstart is missing"),
        ({"quickstart": "huge"}, "quickstart is 'huge': input should be 'tiny' or 'smollm2'"),
        (
            {"quickstart": "tiny", "seed": [0]},
            "unknown key 'seed' at the top; did you mean 'seeds'",
        ),
        ({"quickstart": "tiny", "seeds": [0, 0]}, "seeds is [0, 0]: each may be named once"),
        ({"quickstart": "tiny", "seeds": [-1]}, "seeds is [-1]: seeds must be at least 0"),
        ({"quickstart": "tiny", "solutions": [0]}, "solutions is [0]: there must be at least 1"),
        (
            {"quickstart": "smollm2", "voices": ["own"]},
            "'voices': here it is solution_styles",
        ),
        (
            {"quickstart": "tiny", "solution_styles": ["own"]},
            "solution_styles is ['own']: the tiny worksheets",
        ),
        ({"quickstart": "tiny", "methods": ["ppo"]}, "methods.0 is 'ppo'"),
        ({"quickstart": "tiny", "variants": {"../a": {}}}, "a name becomes a directory's"),
        (
            {"quickstart": "tiny", "variants": {"a": {}}, "solutions": [1, 2]},
            "variants: they go with one number of solutions",
        ),
    ],
)
def test_bad_study_files(tmp_path, values, says):
    with pytest.raises(UserError) as error:
        load_study(write(tmp_path / "study.yaml", **values))
    assert says in str(error.value)


def test_settings_are_checked_before_anything_runs(tmp_path, capsys):
    for values, says in [
        ({"variants": {"a": {}, "b": {"loss": {"clip": "hard"}}}}, "variants.b: loss.clip is"),
        ({"settings": {"sft": {"train": {"step": 3}}}}, "settings: unknown key 'step' in section"),
    ]:
        file = write(tmp_path / "study.yaml", quickstart="tiny", **values)
        assert main(["compare", str(file), "--output", str(tmp_path / "out")]) == 1
        assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.yaml"], "CONFIG is 'missing.yaml': no such file"),
        (["runs", "missing.yaml"], "RUN_DIR: give either run directories or configs"),
        (["runs", "--seeds", "0"], "--seeds and --tokens are for configs"),
        ([str(EXAMPLES / "study-tiny.yaml"), "--seeds", "0"], "has its own seeds"),
        ([str(EXAMPLES / "smollm2.yaml"), "--seeds", "0,0"], "--seeds is '0,0'"),
        ([str(EXAMPLES / "smollm2.yaml"), "--tokens", "0"], "train.token_budget is 0"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 1
    assert says in capsys.readouterr().err


STUDIES = [path for path in sorted(EXAMPLES.glob("*.yaml")) if is_study(path)]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_examples_are_studies(path, tmp_path):
    study = load_study(path)
    check_settings(study)
    jobs = study_jobs(study, tmp_path)
    assert len(jobs) == len(study.cells)
    assert sum(map(len, jobs.values())) == len(study.cells) * len(study.seeds)


def test_a_variants_name_is_no_address(tmp_path, monkeypatch):
    for name in ("study_columns", "study_rows"):
        monkeypatch.setattr(f"opsd.compare.study_page.{name}", lambda *_: [["a"]])
    name = "javascript:alert(1)"
    study = load_study(write(tmp_path / "s.yaml", quickstart="tiny", variants={name: {}}))
    page = study_page(study, {name: SimpleNamespace(notes=[])})
    assert 'href="javascript%3Aalert%281%29/comparison.html"' in page
    assert 'href="javascript:' not in page


def test_a_note_says_whose_it_is_unless_it_is_everyones():
    held, shipped = ["Both.", "Seed 0: no."], ["Both.", "Seeds 0, 1: no."]
    notes = study_notes({"a": SimpleNamespace(notes=held), "b": SimpleNamespace(notes=shipped)})
    assert notes[1:] == ["Both.", "a: Seed 0: no.", "b: Seeds 0, 1: no."]


def test_solution_styles():
    assert tuple(SOLUTION_STYLES) == get_args(SolutionStyle)
    spoken = {
        style: chain_sum.make_chain_sum(
            1, cold_start=0, train=3, held_out=1, solution_style=style
        ).train
        for style in SOLUTION_STYLES
    }
    for rows in zip(*spoken.values(), strict=True):
        assert len({row.problem for row in rows}) == 1
        assert len({row.solution for row in rows}) == len(SOLUTION_STYLES)
        for row in rows:
            assert row.solution.count(f"\\boxed{{{row.answer}}}") == 1
            assert row.columns["solution"] == row.solution
    assert spoken["terse"][0].solution.startswith("\\boxed")
    with pytest.raises(ValueError, match="solution_style is 'loud': it must be one of words"):
        chain_sum.make_chain_sum(1, cold_start=0, train=1, held_out=1, solution_style="loud")


def test_few_solutions_are_repeated():
    rows = chain_sum.make_rows(0, 5)
    assert repeated(rows, 2) == [rows[0], rows[1], rows[0], rows[1], rows[0]]
    assert repeated(rows, None) == rows and repeated(rows, 9) == rows
    held = repeated(rows, 2, hold=True)
    assert [row.problem for row in held] == [rows[i].problem for i in (0, 2, 3, 4, 1)]
    assert [bool(row.solution) for row in held] == [True, False, False, False, True]
    assert repeated(rows, None, hold=True) == rows
