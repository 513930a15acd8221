"""The command line: help, exit codes, and one clear line for everything a user can get wrong."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.lines import read_lines
from helpers.training_cases import ROWS, short_values, write_rows

from opsd.cli.main import main
from opsd.config.config import Config
from opsd.config.load import merge, parse_config, save_config, with_overrides

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(files, tmp_path):
    """A good config's path; what is changed in it is overridden."""
    values = short_values(*files, tmp_path / "run")
    values = merge(values, {"train": {"steps": 1, "save_every": 0}, "eval": {"samples": 0}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def refused(capsys, *arguments) -> str:
    """The one line on stderr of a command that must exit with 1."""
    code = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert code == 1, error
    assert "Traceback" not in error
    assert len(lines) == 1 and lines[0].startswith("opsd: "), error
    return lines[0]


@pytest.mark.parametrize("command, told", [("main(['examples'])", False), ("", True)])
def test_deepspeed_does_not_tell_of_a_cpu(command, told):
    """peft and transformers import it for any model with adapters, where it is installed."""
    code = f"from opsd.cli.main import main\n{command}\nimport deepspeed.accelerator as found\n"
    code += "found.get_accelerator()"
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    script = [sys.executable, "-c", code]
    ended = subprocess.run(script, capture_output=True, text=True, check=True, env=environment)
    assert ("Setting accelerator to CPU" in ended.stdout + ended.stderr) == told


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU can")
@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("loss.backend=cuda", "loss.backend is 'cuda': it cannot run here ("),
        ("model.attention=flash_attention_2", "model.attention is 'flash_attention_2': it needs"),
        ("train.prefix_kernel=flash", "train.prefix_kernel is 'flash': it needs a GPU"),
        ("rollout.engine=vllm", "rollout.engine is 'vllm'"),
        ("model.lora={quantize: nf4}", "model.lora.quantize is 'nf4'"),
    ],
)
def test_what_needs_a_gpu_is_refused_before_the_weights(
    override, wanted, config, capsys, monkeypatch
):
    monkeypatch.setattr("opsd.training.run.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert wanted in refused(capsys, "train", config, override)


def test_rows_that_are_too_long_may_be_left_out(files, config, tmp_path, capsys):
    long = replace(ROWS[3], columns={**ROWS[3].columns, "problem": "1+1;" * 80})
    data = write_rows(tmp_path / "long.jsonl", [*ROWS[:3], long, *ROWS[4:]])
    assert "the model's window is 256" in refused(
        capsys, "train", config, f"data.source={data}", f"eval.source={files[1]}"
    )
    overrides = [f"data.source={data}", "eval.problems=0", "prompts.too_long=skip"]
    overrides += [f"output.dir={tmp_path / 'skips'}"]
    assert main(["train", str(config), *overrides]) == 0
    shown = capsys.readouterr()
    assert "1 of 16 rows are left out" in shown.out + shown.err


def test_held_out_problems_that_are_too_long_are_named(config, tmp_path, capsys):
    """A problem of which nothing fits, and one that fits without its solution alone."""
    columns = [dict(row.columns) for row in ROWS[:5]]
    columns[1]["problem"] = "1+1;" * 80
    columns[0]["solution"] = "1+1;" * 80
    data = tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in columns))
    asked = [f"eval.source={data}", "eval.samples=1"]
    line = refused(capsys, "train", config, *asked)
    assert "eval.source: held-out problem 1 needs" in line and "2 of 4 held-out problems" in line
    assert "eval.max_new_tokens" not in line and "too_long: skip" in line  # no answer would fit
    skips = [*asked, "prompts.too_long=skip", f"output.dir={tmp_path / 'skips'}"]
    assert main(["train", str(config), *skips, "--dry-run"]) == 0
    assert "2 held out" in capsys.readouterr().out
    assert main(["train", str(config), *skips]) == 0
    shown = capsys.readouterr().out
    assert "2 of 4 held-out problems are left out (1, 2)" in shown
    (last,) = read_lines(tmp_path / "skips" / "evaluations.jsonl")[-1:]
    assert last["problems"] == 2
    # Nobody reads the teacher's choices beside it: the first one fits.
    alone = [*skips[:2], "eval.samples=0", "prompts.too_long=skip", "output.dir=unused"]
    assert main(["train", str(config), *alone, "--dry-run"]) == 0
    assert "1 of 4 held-out problems are left out (2)" in capsys.readouterr().out


def test_a_dry_run_grades_no_row_that_it_made_itself(config, tmp_path, capsys):
    """Few problems are held by such rows, which have no solution."""
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(dict(row.columns)) + "\n" for row in ROWS[:6]))
    overrides = [f"data.source={data}", "eval.problems=2", "eval.samples=1", "train.steps=20"]
    assert main(["train", str(config), *overrides, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 problems" in said and "12 with other numbers hold" in said
    assert "of the first 4 solutions would be graded right" in said


def test_the_output_directory_is_respected(config, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(config)]) == 0
    assert "before, 0.000 (0.000 to" in capsys.readouterr().out
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert "--resume" in refused(capsys, "train", config)
    line = refused(capsys, "train", config, "train.seed=5", "--resume")
    assert "another config (train.seed is 0 there, 5 here)" in line
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    line = refused(capsys, "train", config, f"output.dir={foreign}")
    assert "files that are not a run's" in line
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    line = refused(capsys, "train", config, f"output.dir={foreign / 'thesis.txt'}")
    assert "a file is in the way" in line
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    # A finished run starts again when told so by name.
    assert main(["train", str(config), "--resume"]) == 0
    assert f"{run} is done; a larger train.steps goes on" in capsys.readouterr().out
    assert main(["train", str(config), "--resume", "--start-over"]) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_a_resume_where_there_is_no_run_says_so(config, tmp_path, capsys):
    (tmp_path / "rnu").mkdir()
    assert main(["train", str(config), "--resume"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"There is no {tmp_path / 'run'} to go on from: it begins; did you mean")


def test_a_refused_config_can_be_mended_and_run(config, tmp_path, capsys):
    """What is wrong with the data must not leave a directory that stands in the way."""
    good = config.read_text()
    config.write_text(good.replace("rows.jsonl", "rws.jsonl"))
    assert "rws.jsonl" in refused(capsys, "train", config)
    config.write_text(good)
    assert main(["train", str(config)]) == 0


def test_fields_that_may_change_exist():
    from opsd.config.load import describe
    from opsd.runs.directory import MAY_CHANGE

    fields = {f"{section}.{name}" for section, name, *_ in describe()} | {"output"}
    assert all(any(f"{f}.".startswith(f"{m}.") for f in fields) for m in MAY_CHANGE)


def test_a_run_goes_on_with_what_its_own_messages_advise(config, tmp_path, capsys):
    """Smaller micro-batches, steps left out, another server; and with more steps."""
    run, base = tmp_path / "run", ["train.save_every=1", "eval.problems=0"]
    assert main(["train", str(config), *base]) == 0
    advised = ["train.micro_batch_tokens=64", "train.not_finite=skip", "train.steps=3"]
    assert "--resume" in refused(capsys, "train", config, *base, *advised)
    assert main(["train", str(config), *base, *advised, "--resume"]) == 0
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["train"]["micro_batch_tokens"] == 64 and saved["train"]["steps"] == 3
    line = refused(capsys, "train", config, *base, *advised, "--resume", "rollout.top_k=3")
    assert "another config (rollout.top_k is 0 there, 3 here)" in line
    linear = ["--resume", "train.schedule=linear", "train.steps=9"]
    line = refused(capsys, "train", config, *base, *linear)
    assert "train.steps is 3 there, 9 here" in line and "train.schedule" in line


def test_overrides_may_stand_on_both_sides_of_an_option(config, tmp_path):
    arguments = ["train", str(config), "--resume", "eval.problems=0", "--debug", "train.seed=3"]
    assert main(arguments) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["train"]["seed"] == 3 and saved["eval"]["problems"] == 0


# The other commands.


def test_eval_measures_a_model(files, tmp_path, capsys):
    output = tmp_path / "evaluation"
    arguments = ["eval", files[0], "--benchmark", files[1], "--problems", 3, "--output", output]
    prompt = ["--max-new-tokens", 5]
    assert main([str(argument) for argument in [*arguments, *prompt]]) == 0
    result = json.loads((output / "result.json").read_text())
    assert result["problems"] == 3 and result["accuracy"] == 0.0
    assert "avg@1" in capsys.readouterr().out
    line = refused(capsys, *arguments, "--max-new-tokens", 5000)
    assert "--max-new-tokens is 5000" in line
    assert "greedy" in refused(capsys, *arguments, "--samples", 2)


@pytest.mark.parametrize("name", [" ", "   ", " none.yaml", "a b.yaml", "b "])
def test_a_config_named_by_blanks_is_told(name, capsys):
    assert f"CONFIG is {name!r}: no such file" in refused(capsys, "train", name)


def test_debug_shows_the_traceback(tmp_path):
    from opsd.common.errors import UserError

    with pytest.raises(UserError, match="no such file"):
        main(["train", str(tmp_path / "none.yaml"), "--debug"])


def test_ctrl_c_ends_a_run_cleanly(config, tmp_path, capsys):
    """A real interrupt in the middle of training: 130, one line, and --resume finishes the run."""
    overrides = ["train.steps=100000", "train.save_every=5", "eval.problems=0"]
    command = [sys.executable, "-m", "opsd", "train", str(config), *overrides]
    run = tmp_path / "run"
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 240
        while not list(run.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error and "interrupted; step " in error and "is saved in" in error


def test_a_pipe_that_closes_is_no_crash():
    from opsd.config.load import describe

    assert sum(1 for _ in describe()) > 50
    command = f"{sys.executable} -m opsd train --help | head -1"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.startswith("usage: opsd train") and "Traceback" not in result.stderr


# Help.


def test_help_is_fast_and_imports_no_torch():
    code = (
        "import sys\n"
        "from opsd.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["train", "--help"], ["quickstart", "--help"]):
        subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, timeout=120)
    # Processor time: other work on the machine is not the command's fault.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "opsd", "--help"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_a_bad_config_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {pth: x}")
    code = (
        "import sys\nfrom opsd.cli.main import main\n"
        "assert main(['train', sys.argv[1]]) == 1\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.yaml")],
        cwd=ROOT,
        check=True,
        timeout=120,
    )


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from opsd.cli.main import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.source=broken.jsonl"], "line 3 of 'broken.jsonl' is not valid JSON"),
        (["data.source=broken.jsonl", "data.limit=2"], "train.problems_per_step (4) may be at"),
        (["eval.problems=9"], "eval.problems: 9 held-out problems cannot be taken"),
        (["prompts.teacher={{ solutoin }}"], "did you mean 'solution'?"),
        (["output.dir=other"], "it holds files that are not a run's"),
        (["output.dir=begun", "train.seed=1"], "a run with another config (train.seed is 0 there"),
        (["output.dir=begun", "train.steps=3"], "has been started before; go on with --resume"),
    ],
)
def test_wrong_rows_templates_and_directories_are_refused_before_torch(more, said, tmp_path):
    row = '{"problem": "%d+1", "solution": "it is %d", "answer": "%d"}\n'
    rows = [row % (n, n + 1, n + 1) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "broken.jsonl").write_text("".join([*rows[:2], "{'problem'", *rows[3:]]))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    good = ["model.path=model", "data.source=rows.jsonl", "eval.problems=0"]
    good += ["train.problems_per_step=4"]
    (tmp_path / "c.yaml").write_text("{}")
    for name in ("other", "begun"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    begun = with_overrides({}, [*good, "output.dir=begun", "train.steps=3", "train.precision=fp32"])
    begun |= {"prompts": {"date": "2026-11-30"}}
    save_config(parse_config(begun), tmp_path / "begun" / "config.yaml")
    command = [sys.executable, "-c", WITHOUT_TORCH, "train", "c.yaml", *good, *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and said in done.stderr, done.stderr or done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_train_help_documents_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    for section, field in Config.model_fields.items():
        if section == "method":
            assert field.description in " ".join(text.split())
            continue
        part = text.split(f"\n  {section}:\n")[1].split("\n\n")[0]
        for name, inner in field.annotation.model_fields.items():
            said = " ".join(inner.description.split())
            assert f"    {name}  [" in part and said in " ".join(part.split())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["trian", "c.yaml"], "did you mean 'train'?"),
        (["evel", "model"], "did you mean 'eval'?"),
        (["quickstrat", "--tiny"], "did you mean 'quickstart'?"),
        (["train", "c.yaml", "--learning_rate", "1e-5"], "set as in train.learning_rate=1e-5"),
        (["train", "c.yaml", "--learning-rate=1e-5"], "set as in train.learning_rate=1e-5"),
        (["train", "c.yaml", "--num_generations", "8"], "set as in rollout.group_size=8"),
        (["train", "c.yaml", "--output_dir", "runs/x"], "set as in output.dir=runs/x"),
    ],
)
def test_a_slip_on_the_command_line_is_told_what_was_meant(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    *usage, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said in error and len(usage) == 1


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("opsd 0.")


def test_no_command_is_a_usage_error(capsys):
    for arguments in ([], ["fly"], ["train"], ["train", "c.yaml", "--fast"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "usage: opsd" in capsys.readouterr().err


# Faults of ours.


def test_a_fault_of_ours_is_one_line_and_its_own_exit_code(tmp_path, capsys, monkeypatch):
    def fault(*arguments):
        raise RuntimeError("a\nb")

    monkeypatch.setattr("opsd.cli.report.run", fault)
    assert main(["report", str(tmp_path)]) == 70
    said = capsys.readouterr().err
    line = r"opsd: internal error at main\.py:\d+: RuntimeError: a b; please report it.*--debug.*\n"
    assert re.fullmatch(line, said)
    with pytest.raises(RuntimeError):
        main(["report", str(tmp_path), "--debug"])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 GB")])
def test_too_little_memory_is_no_fault_of_ours(error, tmp_path, capsys, monkeypatch):
    def fault(*arguments):
        raise error

    monkeypatch.setattr("opsd.cli.report.run", fault)
    assert main(["report", str(tmp_path)]) == 1
    assert "opsd: there is not enough memory for that (" in capsys.readouterr().err


FROZEN_AT_EXIT = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))  # called last
from opsd.cli.first_look import import_torch
from opsd.common.display import Display
import_torch(Display(quiet=True))
"""


NOT_COLLECTED = """
import gc
seen = []
gc.callbacks.append(lambda phase, told: seen.append(told["generation"]))
from opsd.cli.first_look import import_torch
from opsd.common.display import Display
gc.collect()
seen.clear()
import_torch(Display(quiet=True))
print(2 in seen, gc.isenabled())
"""


def test_nothing_is_collected_while_torch_is_imported():
    """It took a fifth of the imports' time: 1.1 of 5.5 seconds."""
    command = [sys.executable, "-P", "-c", NOT_COLLECTED]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False True\n"
    )


def test_nothing_imported_outlives_the_interpreter():
    """At the end of every command triton 3.9 reported what was frozen as leaked."""
    command = [sys.executable, "-P", "-c", FROZEN_AT_EXIT]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0\n"


def test_an_output_that_nobody_reads_ends_without_a_word():
    """As in `opsd examples | head -1`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "opsd", "examples"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


ENDS = """
import atexit
from concurrent.futures import ThreadPoolExecutor
import opsd.cli.main as cli

class Kept:
    def __del__(self):
        print("cleared")

kept, pool = Kept(), ThreadPoolExecutor()
pool.submit(print, "by a thread").result()
atexit.register(print, "at exit")
cli.main = lambda: print("said") or 3
cli.command()
"""


def test_the_command_ends_without_clearing_what_was_imported():
    """All is said, threads have ended, what is to be done at exit is done."""
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and not done.stderr
    assert done.stdout.split("\n") == ["by a thread", "said", "at exit", ""]
