"""`rollout.ahead`: a server samples a step's rollouts while the step before it trains."""

import os
import shutil
import signal
import threading
import time

import pytest
import torch
from helpers.lines import read_lines
from helpers.payload import Payload
from helpers.saved import sealed
from helpers.training_cases import logits, quiet, short_config, timeless
from helpers.vllm_server import FakeVLLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.http import ServerGoneError
from opsd.config.load import merge, save_config
from opsd.rollout import DistributedSampler, Rollout, RolloutsAhead, Sampling
from opsd.rollout.vllm_client import VLLMServer
from opsd.rollout.vllm_server import ServerSampler
from opsd.runs.log import FILES
from opsd.training.checkpoints import Checkpoints, read_tensors
from opsd.training.collect_rollouts import RolloutCollector
from opsd.training.learning_curve import LearningCurve
from opsd.training.rollouts_ahead import FILE, as_tensors, of_tensors
from opsd.training.run import train
from opsd.training.step import GradientAccumulator
from opsd.training.trainer import TrainingLoop

pytestmark = pytest.mark.usefixtures("no_report")

STEPS = 5


@pytest.fixture
def fake(files):
    server = FakeVLLM(files[0])
    yield server
    server.stop()


def config_of(files, directory, fake, **sections):
    values = {
        "rollout": {
            "engine": "vllm_server",
            "server": fake.address,
            "server_patience": 0.4,
            "ahead": 1,
            "group_size": 2,
        },
        "train": {"steps": STEPS, "save_every": 1, "save_total_limit": 9},
    }
    return short_config(*files, directory, **merge(values, sections))


def outcome(directory):
    """All that a run logs but for clocks and addresses, and its weights, to the bit."""
    lines = {name: timeless(read_lines(directory / name)) for name in FILES}
    weights = load_file(directory / "model" / "model.safetensors")
    return lines, {name: tensor.tolist() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """A run that nobody disturbs."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    fake = FakeVLLM(files[0])
    train(config_of(files, directory, fake), quiet())
    fake.stop()
    return directory


def slow_down(fake, seconds):
    """It takes so long over each rollout, and over nothing else."""
    drawn = fake._drawn
    fake._drawn = lambda *what: (time.sleep(seconds()), drawn(*what))[-1]


def ages(directory):
    return [line["rollout_age"] for line in read_lines(directory / "metrics.jsonl")]


def test_each_rollout_is_by_the_weights_that_it_names(fake, files, tmp_path, monkeypatch):
    """By those of a checkpoint, loaded by transformers: its log-probabilities are the engine's."""
    steps = []
    collect = RolloutCollector.__call__

    def spy(self, *arguments):
        found = collect(self, *arguments)
        steps.append(found.sampled)
        return found

    monkeypatch.setattr(RolloutCollector, "__call__", spy)
    run = tmp_path / "run"
    train(config_of(files, run, fake), quiet())
    assert len(steps) == STEPS and ages(run) == [0, 1, 1, 1, 1]
    named = [{r.weights_of for p in problems for r in p.rollouts} for problems in steps]
    assert named == [{0}, {0}, {1}, {2}, {3}]
    lines = read_lines(run / "rollouts.jsonl")
    assert [line["weights_of"] for line in lines] == [max(0, line["step"] - 2) for line in lines]
    places = [files[0], *(run / f"checkpoint-{step}" for step in range(1, STEPS))]
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in places]

    @torch.no_grad()
    def apart(problem, rollout, model):
        own = logits(model, problem.context.student, rollout.ids).log_softmax(-1)
        own = own.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
        return float((own - torch.tensor(rollout.sampling_log_probs)).abs().max())

    for problems in steps:
        for problem in problems:
            for rollout in problem.rollouts:
                assert apart(problem, rollout, models[rollout.weights_of]) < 1e-5
                assert apart(problem, rollout, models[rollout.weights_of + 1]) > 1e-4
    for line in read_lines(run / "metrics.jsonl"):  # the ratio is of two steps' weights
        assert (abs(line["importance_ratio"] - 1) > 1e-5) == (line["rollout_age"] == 1)


def test_the_next_step_is_asked_for_before_this_one_trains(fake, files, tmp_path, monkeypatch):
    """And the server is given no weights, nor asked for an evaluation's answers, until it is done
    with them."""
    seen, update, loads = [], TrainingLoop._update, []
    expected = [12, 18, 24, 30, 30]

    def counting(self):
        until = time.monotonic() + 60  # threads ask; a busy machine starts them late
        while len(fake.completions()) < expected[len(seen)] and time.monotonic() < until:
            time.sleep(0.01)
        seen.append(len(fake.completions()))
        update(self)

    monkeypatch.setattr(TrainingLoop, "_update", counting)
    load = fake._reload
    fake._reload = lambda directory: (loads.append(fake._together), load(directory))[-1]
    train(config_of(files, tmp_path / "run", fake, eval={"problems": 0}), quiet())
    assert seen == expected
    slow_down(fake, lambda: 0.5)  # so that an evaluation finds them under way
    monkeypatch.undo()
    config = config_of(files, tmp_path / "slow", fake, eval={"every": 1}, train={"steps": 3})
    fake._reload = lambda directory: (loads.append(fake._together), load(directory))[-1]
    train(config, quiet())
    assert {*loads} == {0} and ages(tmp_path / "slow") == [0, 1, 1]


WHERE = {
    "in the gradient": (GradientAccumulator, "__call__"),
    "in the update": (TrainingLoop, "_update"),
    "while logging": (TrainingLoop, "log"),
    "while evaluating": (LearningCurve, "__call__"),
    "while saving": (Checkpoints, "write"),
    "when the next step begins": (DistributedSampler, "begin"),
    "when they are needed": (RolloutCollector, "_ready"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", WHERE)
def test_an_interrupted_run_goes_on_bit_for_bit(
    where, number, fake, files, straight, tmp_path, capsys
):
    place, file, calls = tmp_path / "run", tmp_path / "run.yaml", []
    save_config(config_of(files, place, fake, train={"save_every": 0}), file)
    owner, name = WHERE[where]
    original = getattr(owner, name)
    first = name in ("_ready",)  # before it, while the rollouts are under way

    def interrupted(self, *arguments, **named):
        result = None if first else original(self, *arguments, **named)
        if not calls and (name == "write" or len(read_lines(place / "metrics.jsonl")) >= 2):
            calls.append(number)
            os.kill(os.getpid(), number)
        return original(self, *arguments, **named) if first else result

    fake.delay = 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        due = ["train.save_every=3"] if name == "write" else []
        assert main(["train", str(file), *due]) == 128 + number, capsys.readouterr()
    fake.delay = 0.0
    (kept,) = place.glob("checkpoint-*")
    assert calls and (kept / FILE).is_file()
    assert main(["train", str(place), "--resume", "train.save_every=1"]) == 0
    assert outcome(place) == outcome(straight)


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_goes_on_from_a_checkpoint_bit_for_bit(step, fake, files, straight, tmp_path):
    """What a run leaves that is killed in the step after it."""
    shutil.copytree(straight, tmp_path / "run")
    for other in (tmp_path / "run").glob("checkpoint-*"):
        if int(other.name.split("-")[1]) > step:
            shutil.rmtree(other)
    shutil.rmtree(tmp_path / "run" / "model")
    config = config_of(files, tmp_path / "run", fake)
    save_config(config, tmp_path / "run" / "config.yaml")
    train(config, quiet(), resume=True)
    assert outcome(tmp_path / "run") == outcome(straight)
    assert len(fake.completions()) == 6 * (STEPS - step - 1) + 4 * len(
        [s for s in range(step, STEPS + 1) if s > step and (s % 2 == 0 or s == STEPS)]
    )


@pytest.mark.parametrize("gone", [signal.SIGTERM, signal.SIGINT])
def test_rollouts_that_do_not_come_are_given_up(gone, fake, files, tmp_path, monkeypatch, capsys):
    """After SIGTERM in some seconds, after Ctrl-C by another."""
    monkeypatch.setattr("opsd.training.trainer.GRACE", 0.2)
    place, file = tmp_path / "run", tmp_path / "run.yaml"
    sections = {"train": {"save_every": 0}, "eval": {"problems": 0}}
    save_config(config_of(files, place, fake, **sections, rollout={"server_timeout": 60}), file)
    ready = RolloutCollector._ready

    def interrupted(self, *arguments):
        if len(read_lines(place / "metrics.jsonl")) == 2:
            os.kill(os.getpid(), gone)
        return ready(self, *arguments)

    begin = DistributedSampler.begin
    monkeypatch.setattr(
        DistributedSampler,
        "begin",
        lambda self, *what: (
            setattr(fake, "delay", 60.0 if len(read_lines(place / "metrics.jsonl")) else 0.0),
            begin(self, *what),
        )[-1],
    )
    monkeypatch.setattr(RolloutCollector, "_ready", interrupted)
    if gone == signal.SIGINT:
        wait = RolloutsAhead.wait

        def cut_short(self, seconds=None):
            if seconds is None and not self.own.done():
                threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            wait(self, seconds)

        monkeypatch.setattr(RolloutsAhead, "wait", cut_short)
    begun = time.monotonic()
    assert main(["train", str(file)]) == 128 + gone
    assert time.monotonic() - begun < 45
    said = "".join(capsys.readouterr())
    assert "Waiting for rollouts, to save them too" in " ".join(said.split())
    assert (place / "checkpoint-2").is_dir() and not (place / "checkpoint-2" / FILE).exists()
    monkeypatch.undo()
    fake.delay = 0.0
    assert main(["train", str(place), "--resume"]) == 0
    assert "Step 3: its rollouts were lost, and are sampled by newer weights" in " ".join(
        "".join(capsys.readouterr()).split()
    )
    assert ages(place) == [0, 1, 0, 1, 1]


def test_a_server_that_dies_while_it_samples_ahead(fake, files, tmp_path):
    place = tmp_path / "run"
    config = config_of(files, place, fake, eval={"problems": 0})
    fake.dies_after = 6 * 3 + 2
    with pytest.raises(ServerGoneError, match=r"step 3 is saved in .*checkpoint-3"):
        train(config, quiet())
    assert (place / "checkpoint-2" / FILE).exists() and not (place / "checkpoint-3" / FILE).exists()
    fake.dies_after = None
    train(config, quiet(), resume=True)
    assert ages(place) == [0, 1, 1, 0, 1]


def test_a_server_that_starts_anew_while_it_samples_ahead(fake, files, tmp_path):
    """It is given the newest weights, and asked again: no rollout is by those that it starts with,
    and none names others than its own."""
    fake.restarts_at = 6 * 3 + 2
    place = tmp_path / "run"
    train(config_of(files, place, fake, eval={"problems": 0}), quiet())
    assert fake.instance == 1 and ages(place) == [0, 1, 1, 0, 1]
    at_once = read_lines(place / "metrics.jsonl")[3]
    assert abs(at_once["importance_ratio"] - 1) < 1e-4
    lines = read_lines(place / "rollouts.jsonl")
    assert {line["weights_of"] for line in lines if line["step"] == 4} == {3}


def grade(completion, row):
    """Longer is better, and an even length right."""
    return len(completion) % 2


def test_with_dynamic_sampling(fake, files, tmp_path):
    """What is drawn beside is by the newest weights; the run resumes bit for bit."""
    sections = {
        "method": "grpo",
        "rollout": {"dynamic_sampling": 2},
        "loss": {"reward": {"verifier": f"{__file__}:grade"}},
        "train": {"inner_epochs": 2},
    }
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(config_of(files, whole, fake, **sections), quiet())
    assert ages(whole)[0] == 0 and all(0 < age <= 1 for age in ages(whole)[1:])
    assert any(age < 1 for age in ages(whole)[1:]), "nothing was drawn beside"
    shutil.copytree(whole, again)
    for step in (3, 4, 5):
        shutil.rmtree(again / f"checkpoint-{step}")
    shutil.rmtree(again / "model")
    config = config_of(files, again, fake, **sections)
    save_config(config, again / "config.yaml")
    train(config, quiet(), resume=True)
    assert outcome(again) == outcome(whole)


def test_a_run_that_ends_early_asks_for_no_more(fake, files, tmp_path):
    place = tmp_path / "run"
    train(config_of(files, place, fake, train={"token_budget": 40}), quiet())
    steps = read_lines(place / "metrics.jsonl")
    assert 1 < len(steps) < STEPS and steps[-1]["generated_tokens"] >= 40
    asked = len(fake.completions())
    time.sleep(0.3)
    assert asked == len(fake.completions())


def test_what_nobody_wants_any_more_is_not_asked_for(fake, tmp_path):
    slow_down(fake, lambda: 0.5)
    server = ServerSampler(VLLMServer(fake.address, patience=0.4), frozenset({1}), tmp_path / "w")
    sampling = Sampling(2, batch_size=1)
    future = server.begin([[2, 3]] * 9, sampling)
    until = time.monotonic() + 60
    while not fake.completions() and time.monotonic() < until:
        time.sleep(0.01)
    future.cancel()
    time.sleep(1.5)
    assert 1 <= len(fake.completions()) < 6


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"rollout": {"engine": "generate", "server": None}}, r"ahead is 1: only a server samples"),
        ({"method": "sft"}, r"rollout\.ahead is 1: sft has no rollouts"),
        ({"loss": {"importance_bound": None}}, r"ahead is 1: .*importance_bound must correct"),
        ({"rollout": {"ahead": 2}}, r"rollout\.ahead"),
    ],
)
def test_combinations_that_make_no_sense(sections, said, fake, files, tmp_path):
    with pytest.raises(UserError, match=said):
        config_of(files, tmp_path / "run", fake, **sections)


# What a checkpoint keeps.

KEPT = [Rollout([4, 5, 9], True, [-0.1, -1e-17, -9999.0], 7), Rollout([3], False, [-0.3], None)]


def test_what_is_kept_comes_back_to_the_bit(tmp_path):
    torch.save(as_tensors(KEPT), tmp_path / FILE)
    assert of_tensors(read_tensors(tmp_path / FILE), 2, 3, 10) == KEPT


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: [], "holds no rollouts"),
        (lambda t: t.pop("seeds"), "holds no rollouts"),
        (lambda t: t.update(ids=t["ids"].float()), "holds no rollouts"),
        (lambda t: t.update(ids=t["ids"][None]), "holds no rollouts"),
        (lambda t: t.update(seeds=t["seeds"][:1]), "holds 2 rollouts, and the step has 2"),
        (lambda t: t.update(lengths=t["lengths"] * 0), "not of 1 to 3 tokens"),
        (lambda t: t.update(lengths=t["lengths"] * 2), "not of 1 to 3 tokens"),
        (lambda t: t.update(ids=t["ids"][1:]), "lacks tokens"),
        (lambda t: t.update(ids=t["ids"] + 6), "tokens that the model does not have"),
        (lambda t: t.update(ids=-t["ids"]), "tokens that the model does not have"),
        (
            lambda t: t.update(log_probs=-t["log_probs"]),
            "log-probabilities that are not finite, or above 0",
        ),
        (
            lambda t: t.update(log_probs=t["log_probs"] * torch.nan),
            "log-prob.* that are not finite",
        ),
    ],
)
def test_a_damaged_file_is_one_line(change, said):
    tensors = as_tensors(KEPT)
    if (other := change(tensors)) == []:
        tensors = other
    with pytest.raises(ValueError, match=said):
        of_tensors(tensors, 2, 3, 10)


def test_a_checkpoint_whose_rollouts_are_damaged_is_refused(fake, files, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    file = tmp_path / "run" / "checkpoint-4" / FILE
    tensors = torch.load(file)
    torch.save({**tensors, "ids": tensors["ids"] + 1000}, file)
    config = config_of(files, tmp_path / "run", fake)
    save_config(config, tmp_path / "run" / "config.yaml")
    with pytest.raises(UserError, match="checkpoint-4") as caught:
        train(config, quiet(), resume=True)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and FILE in said and "goes on from checkpoint-3" in said


def test_a_checkpoints_rollouts_run_nothing(fake, files, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    torch.save(Payload(tmp_path / "it has run"), tmp_path / "run" / "checkpoint-4" / FILE)
    sealed(tmp_path / "run" / "checkpoint-4")
    config = config_of(files, tmp_path / "run", fake)
    save_config(config, tmp_path / "run" / "config.yaml")
    with pytest.raises(UserError, match=r"checkpoint-4' cannot be read .*Weights only load failed"):
        train(config, quiet(), resume=True)
    assert not (tmp_path / "it has run").exists()
