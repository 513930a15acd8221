"""Ctrl-C and SIGTERM at any point of a run: the steps that are done are saved, and the run goes on
from there bit for bit as one that nobody disturbed."""

import io
import os
import signal

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import short_config, timeless
from safetensors.torch import load_file

from opsd.cli.main import main
from opsd.common.ending import Interruption, Stopped
from opsd.config.load import save_config
from opsd.rollout import GenerateSampler
from opsd.runs.log import FILES, RunLog
from opsd.training.checkpoints import Checkpoints
from opsd.training.learning_curve import LearningCurve
from opsd.training.step import GradientAccumulator
from opsd.training.trainer import TrainingLoop

METHODS = {
    "opsd": {},
    "ema": {"teacher": {"policy": "ema"}},
    "grpo": {"method": "grpo", "rollout": {"group_size": 4}, "train": {"inner_epochs": 2}},
}
WHERE = {
    "while sampling": (GenerateSampler, "sample"),
    "before the gradient": (GradientAccumulator, "__call__"),
    "in the update": (TrainingLoop, "_update"),
    "while logging": (TrainingLoop, "log"),
    "while evaluating": (LearningCurve, "__call__"),
    "while saving": (Checkpoints, "write"),
    "between lines": (RunLog, "sync"),
}


def outcome(directory):
    lines = {name: timeless(read_lines(directory / name)) for name in FILES}
    weights = load_file(directory / "model" / "model.safetensors")
    return lines, {name: tensor.tolist() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    """method → what its run ends with."""
    done = {}
    for method, sections in METHODS.items():
        place = tmp_path_factory.mktemp("undisturbed") / method
        save_config(short_config(*files, place, **sections), place.with_suffix(".yaml"))
        assert main(["train", str(place.with_suffix(".yaml"))]) == 0
        done[method] = outcome(place)
    return done


@pytest.mark.parametrize(
    ("method", "where"),
    [
        *(("opsd", where) for where in WHERE),
        ("ema", "while sampling"),
        ("ema", "in the update"),
        ("grpo", "in the update"),
    ],
)
def test_an_interrupted_run_is_saved(method, where, files, undisturbed, tmp_path, capsys):
    place, file = tmp_path / "run", tmp_path / "run.yaml"
    # No checkpoint is due: what is there was saved for the interrupt.
    train = {**METHODS[method].get("train", {}), "save_every": 0}
    save_config(short_config(*files, place, **{**METHODS[method], "train": train}), file)
    number = signal.SIGTERM if method == "opsd" else signal.SIGINT
    owner, name = WHERE[where]
    original, calls = getattr(owner, name), []

    def interrupted(self, *arguments, **named):
        result = original(self, *arguments, **named)
        # In the third step, or where it is called once or never before the end, then.
        if not calls and trained_steps(place) >= (2 if name not in ("write", "sync") else 0):
            calls.append(number)
            os.kill(os.getpid(), number)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        due = ["train.save_every=2"] if name in ("write", "sync") else []
        code = main(["train", str(file), *due])
    said = capsys.readouterr().err
    assert calls and code == 128 + number, said
    (step,) = [int(c.name.split("-")[1]) for c in place.glob("checkpoint-*")]
    assert 2 <= step <= 3 and step == trained_steps(place)
    assert f"opsd: interrupted; step {step} is saved in {place}/checkpoint-{step}: `opsd train" in (
        said
    )
    assert main(["train", str(place), "--resume", "train.save_every=2"]) == 0
    assert outcome(place) == undisturbed[method]


def trained_steps(place):
    return len(read_lines(place / "metrics.jsonl"))


def test_before_the_first_step_there_is_nothing_to_save(files, tmp_path, capsys):
    place, file = tmp_path / "run", tmp_path / "run.yaml"
    save_config(short_config(*files, place), file)

    def interrupted(self, *_):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerateSampler, "sample", interrupted)
        assert main(["train", str(file), "eval.problems=0"]) == 130
    assert "no step was done" in capsys.readouterr().err
    assert not list(place.glob("checkpoint-*"))


def test_a_second_interrupt_does_not_wait(files, tmp_path, capsys):
    """The update is cut in two: the weights are no step's, and are not saved as one's."""
    place, file = tmp_path / "run", tmp_path / "run.yaml"
    save_config(short_config(*files, place), file)
    step = torch.optim.AdamW.step

    def twice(self, *arguments, **named):
        step(self, *arguments, **named)
        if trained_steps(place) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", twice)
        assert main(["train", str(file), "train.save_every=0", "eval.problems=0"]) == 130
    assert not list(place.glob("checkpoint-*"))
    assert "what was saved before is kept" in capsys.readouterr().err


def test_starting_over_is_asked_for_by_name(files, tmp_path, capsys):
    place, file = tmp_path / "run", tmp_path / "run.yaml"
    save_config(short_config(*files, place, method="sft", eval={"problems": 0}), file)
    assert main(["train", str(file), "train.save_every=0"]) == 0
    before = (place / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["train", str(file), "train.save_every=0", "--resume"]) == 0
    assert f"{place} is done" in capsys.readouterr().out
    (place / "summary.json").unlink()  # as where a run was killed
    assert main(["train", str(place), "--resume"]) == 1
    said = capsys.readouterr().err
    assert f"there is no checkpoint to go on from; `opsd train {place} --resume" in said
    assert (place / "metrics.jsonl").read_bytes() == before
    assert main(["train", str(place), "--resume", "--start-over"]) == 0
    assert "4 steps were not saved" in capsys.readouterr().out


def test_ctrl_c_while_torch_writes_is_no_error_of_ours():
    """torch.save writes a file's end after our exception, and then tells an error of its own."""

    class Interrupted(io.BytesIO):
        sent = False

        def write(self, data) -> int:
            if 0 < self.tell() and not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(data)

    with pytest.raises(Stopped) as raised, Interruption():
        torch.save({"weight": torch.zeros(100_000)}, Interrupted())
    assert raised.value.number == signal.SIGINT


def test_what_fails_while_an_interrupt_is_answered_is_told():
    """Such as a full disk under the checkpoint that it asks for: torch.save raises RuntimeError."""
    with pytest.raises(RuntimeError, match="unexpected pos"), Interruption():
        try:
            raise Stopped(signal.SIGTERM)
        except Stopped:
            try:
                raise OSError("No space left on device")
            except OSError:
                raise RuntimeError("unexpected pos")  # noqa: B904
