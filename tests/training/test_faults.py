"""What the machine may do to a run: disks that are full or read-only, files that are lost, clocks
that jump, workers that die."""

import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.lines import read_lines
from helpers.training_cases import short_config, timeless
from safetensors.torch import load_file
from transformers import PreTrainedModel

from opsd.cli.main import main
from opsd.common.workers import _Worker
from opsd.config.load import save_config
from opsd.grading.grader import Grader
from opsd.runs.log import RunLog

SHORT = {"train": {"steps": 3, "save_every": 1}, "eval": {"problems": 0}}


pytestmark = pytest.mark.usefixtures("no_report")


def trained(files, directory: Path, *words: str) -> int:
    """The exit code of `opsd train` into `directory`; its config is beside it."""
    config = directory.with_suffix(".yaml")
    save_config(short_config(*files, directory, **SHORT), config)
    return main(["train", str(config), *words])


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """A run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opsd.training.run.write_report", lambda directory: None)
        assert trained(files, directory) == 0
    return directory


def outcome(directory: Path):
    """Its steps and weights, to the bit."""
    weights = load_file(directory / "model" / "model.safetensors")
    lines = timeless(read_lines(directory / "metrics.jsonl"))
    return lines, {name: weight.tolist() for name, weight in weights.items()}


def one_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("opsd: "), lines
    return lines[0]


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system in memory, and takes it away afterwards; where we may."""
    places = []

    def mount(*options: str) -> Path:
        place = tmp_path / f"mount-{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_costs_no_more_than_a_step(
    files, straight, mounted, monkeypatch, capsys, tmp_path
):
    disk = mounted("size=48m")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    plain, filler = RunLog.metrics, disk / "somebody else's"

    def metrics(self, line):
        plain(self, line)
        if line["step"] == 2:
            with filler.open("wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - (1 << 18)))

    monkeypatch.setattr(RunLog, "metrics", metrics)
    assert trained(files, disk / "run") == 1
    message = one_line(capsys)
    assert "the disk is full, checkpoint-2 could not be written. The run is kept in" in message
    monkeypatch.undo()
    monkeypatch.setattr("opsd.training.run.write_report", lambda directory: None)
    # It goes on there, by the command that is given, and here, from the step before.
    kept = Path(message.split("kept in ")[1].split(":")[0])
    assert kept.parent == tmp_path / "elsewhere"
    assert sorted(path.name for path in kept.glob("checkpoint*")) == ["checkpoint-2"]
    command = message.split("`")[1].split()
    assert command == ["opsd", "train", str(kept), "--resume"]
    assert main(command[1:]) == 0
    assert outcome(kept) == outcome(straight)
    assert sorted(path.name for path in (disk / "run").glob("checkpoint*")) == ["checkpoint-1"]
    filler.unlink()
    assert trained(files, disk / "run", "--resume") == 0
    assert outcome(disk / "run") == outcome(straight)


def fails_in(directory, error):
    """Each file that is opened for writing there raises this error."""
    real = os.open

    def opened(path, flags, *more, **named):
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if writes and str(path).startswith(str(directory) + "/"):
            raise error
        return real(path, flags, *more, **named)

    return opened


@pytest.mark.parametrize(
    ("when", "number"),
    [("a line", errno.EDQUOT), ("a line", errno.EROFS), ("the model", errno.EACCES)],
)
def test_what_can_no_longer_be_written_is_kept_elsewhere(
    when, number, files, straight, tmp_path, monkeypatch, capsys
):
    """The line of a step that is done is kept too; the trained model alone where all is done."""
    directory, place = tmp_path / "run", tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    error, plain = OSError(number, os.strerror(number)), RunLog.metrics

    def metrics(self, line):
        if line["step"] == (2 if when == "a line" else 3):
            monkeypatch.setattr(os, "open", fails_in(directory, error))
        if when == "a line" or line["step"] < 3:
            plain(self, line)

    monkeypatch.setattr(RunLog, "metrics", metrics)
    assert trained(files, directory, "train.save_every=0", "train.not_finite=stop") == 1
    message = one_line(capsys)
    assert os.strerror(number) in message or "quota" in message
    monkeypatch.undo()
    monkeypatch.setattr("opsd.training.run.write_report", lambda directory: None)
    if when == "the model":
        moved = message.split("`")[1].split()
        assert moved[0] == "mv" and moved[2] == str(directory)
        weights = load_file(Path(moved[1]) / "model.safetensors")
        assert {n: w.tolist() for n, w in weights.items()} == outcome(straight)[1]
        return
    assert "metrics.jsonl could not be written" in message
    assert main(message.split("`")[1].split()[1:]) == 0
    assert outcome(Path(message.split("kept in ")[1].split(":")[0])) == outcome(straight)


def test_a_last_evaluation_that_cannot_be_written_is_said(files, tmp_path, monkeypatch, capsys):
    directory, plain = tmp_path / "run", RunLog.evaluation

    def evaluation(self, line):
        if line["step"] == 3:
            monkeypatch.setattr(os, "open", fails_in(directory, OSError(errno.EDQUOT, "")))
        plain(self, line)

    monkeypatch.setattr(RunLog, "evaluation", evaluation)
    assert trained(files, directory, "eval.problems=2", "eval.every=0") == 1
    message = one_line(capsys)
    assert "evaluations.jsonl could not be written" in message
    assert "its last evaluation is missing" in message
    assert (directory / "model" / "model.safetensors").is_file()


def test_where_nothing_can_be_kept_that_is_said(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "opsd.training.rescue.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0)
    )
    plain = RunLog.metrics

    def metrics(self, line):
        monkeypatch.setattr(os, "open", fails_in(tmp_path / "run", OSError(errno.ENOSPC, "")))
        plain(self, line)

    monkeypatch.setattr("opsd.training.run.try_saving", lambda *_: None)
    monkeypatch.setattr(RunLog, "metrics", metrics)
    assert trained(files, tmp_path / "run") == 1
    assert "what was saved before is whole" in one_line(capsys)


def test_a_disk_that_is_too_small_is_said_before_training(files, mounted, capsys):
    disk = mounted("size=512k")
    assert trained(files, disk / "run") == 1
    assert "GB are free there, the run needs" in one_line(capsys)
    assert not (disk / "run" / "metrics.jsonl").exists()


def test_a_read_only_output_is_one_line(files, mounted, tmp_path, capsys):
    disk = mounted("ro", "size=8m")
    save_config(short_config(*files, disk / "run", **SHORT), tmp_path / "c.yaml")
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    message = one_line(capsys)
    assert f"output.dir is '{disk / 'run'}': cannot write there (Read-only" in message


def test_a_lost_dataset_is_said_and_can_be_brought_back(files, straight, tmp_path, capsys):
    rows = shutil.copy(files[1], tmp_path / "rows.jsonl")
    mine = files[0], rows
    assert trained(mine, tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")  # as a kill before it would leave
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    capsys.readouterr()
    rows.rename(tmp_path / "elsewhere")
    assert trained(mine, tmp_path / "run", "--resume") == 1
    assert f"data.source: there is no file or directory '{rows}'" in one_line(capsys)
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == lines
    (tmp_path / "elsewhere").rename(rows)
    assert trained(mine, tmp_path / "run", "--resume") == 0
    assert outcome(tmp_path / "run") == outcome(straight)


def test_a_dataset_that_has_changed_is_said_and_can_be_brought_back(
    files, straight, tmp_path, capsys
):
    rows = shutil.copy(files[1], tmp_path / "rows.jsonl")
    mine = files[0], rows
    assert trained(mine, tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    text, lines = rows.read_text(), read_lines(tmp_path / "run" / "metrics.jsonl")
    for other in (text.replace("1", "2", 1), text + text.splitlines()[0] + "\n"):
        rows.write_text(other)
        capsys.readouterr()
        assert trained(mine, tmp_path / "run", "--resume") == 1
        wanted = f"({len(text.splitlines())} rows then, {len(other.splitlines())} now); restore"
        assert (said := one_line(capsys)).startswith("opsd: data.source: the problems are not")
        assert wanted in said
        assert read_lines(tmp_path / "run" / "metrics.jsonl") == lines
    rows.write_text(text)
    (tmp_path / "run" / "problems.json").write_text("{")
    capsys.readouterr()
    assert trained(mine, tmp_path / "run", "--resume") == 1
    said = one_line(capsys)
    assert "problems.json' is damaged (" in said and "; without that file" in said
    (tmp_path / "run" / "problems.json").unlink()
    assert trained(mine, tmp_path / "run", "--resume") == 0
    assert outcome(tmp_path / "run") == outcome(straight)


@pytest.mark.parametrize("hours", [-48, 48])
def test_a_clock_that_jumps_changes_nothing(hours, files, straight, tmp_path, monkeypatch):
    plain, shift, metrics = time.time, [0.0], RunLog.metrics

    def jump(self, line):
        metrics(self, line)
        shift[0] += 3600.0 * hours

    monkeypatch.setattr(time, "time", lambda: plain() + shift[0])
    monkeypatch.setattr(RunLog, "metrics", jump)
    begun = time.monotonic()
    assert trained(files, tmp_path / "run") == 0
    taken = time.monotonic() - begun
    assert outcome(tmp_path / "run") == outcome(straight)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    seconds = [line["seconds"] for line in lines]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < taken
    for line in lines:
        assert all(value >= 0 for key, value in line.items() if "second" in key)


def test_a_grading_worker_that_is_killed_in_its_work_costs_one_answer(monkeypatch):
    give, count = _Worker.give, [0]

    def killed(self, job):
        count[0] += 1
        if count[0] == 2:
            os.kill(self.process.pid, signal.SIGSTOP)  # or it might be done before it is killed
        give(self, job)
        if count[0] == 2:
            self.process.kill()

    monkeypatch.setattr(_Worker, "give", killed)
    with Grader() as grader:
        texts = [rf"\boxed{{{number}/2}}" for number in range(4, 12, 2)]
        answers = [str(number // 2) + ".0 + x - x" for number in range(4, 12, 2)]
        grades = grader.grade(texts, answers)
    assert [grade.failed for grade in grades] == [False, True, False, False]
    assert [grade.correct for grade in grades] == [True, False, True, True]
    assert "the grading process died" in grades[1].reason


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rollout.max_new_tokens=230"], "the model's window is 256"),
        (["prompts.teacher={{ problem }}", "prompts.student={{ problem }}"], "contexts are equal"),
    ],
)
def test_what_is_wrong_with_the_rows_is_said_before_weights_are_read(
    words, said, files, tmp_path, monkeypatch, capsys
):
    """They may take minutes."""
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("read"))
    assert trained(files, tmp_path / "run", *words) == 1
    assert said in one_line(capsys)
