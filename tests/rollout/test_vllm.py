"""Rollouts by a vLLM server: one that speaks its API, as it is and as it fails."""

import json
import threading
import time

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import (
    changed,
    logits,
    quiet,
    short_config,
    short_values,
    write_model,
)
from helpers.vllm_server import FakeVLLM
from safetensors.torch import load_file

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.http import ServerGoneError
from opsd.config.load import merge, parse_config
from opsd.models.load import stop_ids
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import GenerateSampler, Sampling, check_engine
from opsd.rollout.threads import as_done
from opsd.rollout.vllm_client import VLLMServer
from opsd.rollout.vllm_server import ServerSampler
from opsd.training.run import train

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def fake(files):
    server = FakeVLLM(files[0])
    yield server
    server.stop()


def client(fake, **more) -> VLLMServer:
    return VLLMServer(fake.address, **{"timeout": 5.0, "patience": 0.4, **more})


def sampler(fake, student, directory, dtype=torch.float32, **more) -> ServerSampler:
    return ServerSampler(client(fake, **more), stop_ids(*student), directory / "weights", dtype)


# The engine: whose tokens, whose log-probabilities.


def test_the_servers_greedy_tokens_are_the_models_own(fake, student, contexts, tmp_path):
    sampling, seen = Sampling(12, temperature=0), []
    rollouts = sampler(fake, student, tmp_path).sample(
        contexts, sampling, lambda *n: seen.append(n)
    )
    own = GenerateSampler(student[0], stop_ids(*student)).sample(contexts, sampling)
    assert [(r.ids, r.finished) for r in rollouts] == [(r.ids, r.finished) for r in own]
    assert {r.finished for r in rollouts} == {True, False} or len({len(r.ids) for r in own}) == 1
    assert sum(sequences for sequences, _ in seen) == len(contexts)
    assert sum(tokens for _, tokens in seen) == sum(len(r.ids) for r in own)


def test_log_probabilities_are_the_models_at_temperature_1(fake, student, contexts, tmp_path):
    torch.manual_seed(0)
    sampling = Sampling(8, temperature=1.7, top_p=0.9, top_k=5)
    for context, rollout in zip(
        contexts, sampler(fake, student, tmp_path).sample(contexts, sampling), strict=True
    ):
        with torch.no_grad():
            wanted = logits(student[0], context, rollout.ids).log_softmax(-1)
        wanted = wanted.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(rollout.sampling_log_probs), wanted, rtol=0, atol=1e-5)


def test_each_rollout_has_a_seed_from_torchs_generator(fake, student, contexts, tmp_path):
    asked, sampling = [contexts[0]] * 6, Sampling(8, temperature=1.5, batch_size=3)
    engine = sampler(fake, student, tmp_path)
    torch.manual_seed(3)
    first = engine.sample(asked, sampling)
    assert len({r.seed for r in first}) == 6 and len({tuple(r.ids) for r in first}) > 1
    torch.manual_seed(3)
    assert engine.sample(asked, sampling) == first
    assert engine.sample(asked, sampling) != first
    assert {body["seed"] for body in fake.completions()[:6]} == {r.seed for r in first}


def test_the_server_follows_the_student(fake, files, student, contexts, tmp_path):
    sampling = Sampling(12, temperature=0)
    engine = sampler(fake, student, tmp_path)
    before = engine.sample(contexts, sampling)
    other = changed(files, seed=9)
    engine.sync_weights(other)
    after = engine.sample(contexts, sampling)
    own = GenerateSampler(other, stop_ids(*student)).sample(contexts, sampling)
    assert [r.ids for r in after] == [r.ids for r in own] != [r.ids for r in before]
    assert not (tmp_path / "weights").exists()
    engine.sync_weights(student[0])
    again = engine.sample(contexts, sampling)
    assert [r.ids for r in again] == [r.ids for r in before]
    paths = [body["kwargs"]["weights_path"] for route, body in fake.requests if "rpc" in route]
    assert len(set(paths)) == 2  # a server may keep what it has read from a path


def test_weights_travel_in_the_dtype_of_rollouts(fake, student, tmp_path):
    sampler(fake, student, tmp_path, torch.bfloat16).sync_weights(student[0])
    (weights,) = fake.reloads
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    named = dict(student[0].named_parameters())
    assert "lm_head.weight" not in named  # tied: a server on a CPU keeps a copy, and needs both
    named["lm_head.weight"] = named["model.embed_tokens.weight"]
    assert weights.keys() == named.keys()
    assert all(torch.equal(w, named[name].bfloat16()) for name, w in weights.items())


def test_a_server_on_a_gpu_is_given_tied_weights_once(fake, student, contexts, tmp_path):
    fake.on_cpu = False
    engine = sampler(fake, student, tmp_path)
    engine.sync_weights(student[0])
    assert fake.reloads[0].keys() == dict(student[0].named_parameters()).keys()
    assert engine.sample(contexts[:1], Sampling(4))


def test_a_server_on_a_cpu_is_never_made_to_split_a_seeded_prompt(
    fake, student, contexts, tmp_path
):
    """vLLM 0.32 ends there."""
    fake.budget = 3 * (max(map(len, contexts)) + 1)
    engine = sampler(fake, student, tmp_path)
    assert len(engine.sample(contexts * 4, Sampling(4, batch_size=24))) == 24
    fake.budget = max(map(len, contexts))
    with pytest.raises(UserError, match=rf"--max-num-batched-tokens {fake.budget + 1} or more"):
        sampler(fake, student, tmp_path).sample(contexts, Sampling(4))
    assert not fake.ended
    fake.budget = 1
    with pytest.raises(UserError, match="EngineCore encountered an issue"):
        engine.sample(contexts, Sampling(4))


def test_what_the_server_would_cut_is_not_asked(fake, student, contexts, tmp_path):
    with pytest.raises(UserError, match="a window of 128 tokens"):
        sampler(fake, student, tmp_path).sample(contexts, Sampling(125))
    assert not fake.completions()


# A server that fails.


@pytest.mark.parametrize("failures", [[503, 500], ["drop", "drop"], [429, "drop", 502]])
def test_failures_that_pass_are_asked_again(failures, fake, student, contexts, tmp_path):
    fake.failures = list(failures)
    engine = sampler(fake, student, tmp_path, patience=5.0)
    rollouts = engine.sample(contexts[:2], Sampling(4, temperature=0))
    own = GenerateSampler(student[0], stop_ids(*student)).sample(
        contexts[:2], Sampling(4, temperature=0)
    )
    assert [r.ids for r in rollouts] == [r.ids for r in own]
    assert len(fake.completions()) == 2 + len(failures)


def test_a_request_that_is_never_answered_is_sent_again(fake, student, contexts, tmp_path):
    engine = sampler(fake, student, tmp_path, timeout=0.3, patience=5.0)
    fake.delay = 20.0
    threading.Timer(0.5, lambda: setattr(fake, "delay", 0.0)).start()
    begun = time.monotonic()
    (rollout,) = engine.sample(contexts[:1], Sampling(4, temperature=0))
    assert len(rollout.ids) == 4 or rollout.finished
    assert time.monotonic() - begun < 10 and len(fake.completions()) >= 2


def test_a_server_that_stays_away_is_given_up(fake, student, contexts, tmp_path):
    engine = sampler(fake, student, tmp_path)
    fake.stop()
    state = torch.get_rng_state()
    begun = time.monotonic()
    with pytest.raises(ServerGoneError, match=r"rollout\.server is 'http://127.*cannot be reached"):
        engine.sample(contexts * 20, Sampling(4, batch_size=4))
    assert time.monotonic() - begun < 3  # not once for each of the 120
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"prompt": [1] * 200}, "400: This model's maximum context length is 128 tokens"),
        ({"model": "other"}, "404: The model `other` does not exist"),
    ],
)
def test_what_will_not_pass_is_an_error_at_once(change, said, fake, student, contexts):
    server = client(fake, patience=60.0)
    server.model = change.get("model", server.model)
    context = change.get("prompt", contexts[0])
    with pytest.raises(UserError, match=said) as caught:
        server.complete(context, Sampling(4), 0, stop_ids(*student))
    assert not isinstance(caught.value, ServerGoneError) and len(fake.completions()) == 1


def test_weights_that_the_server_cannot_read_are_an_error_at_once(fake, tmp_path):
    """It looks for them on the hub, says so, and ends: no reader would guess why."""
    with pytest.raises(UserError, match=r"has not loaded '.*', and must be started anew: look whe"):
        client(fake, patience=60.0).load(tmp_path)


def test_threads_raise_the_first_error_and_begin_no_more():
    begun = []

    def work(i, stopped):
        begun.append(i)
        if i == 2:
            raise ValueError("two")
        stopped.wait(5 if i < 2 else 0)
        return i

    start = time.monotonic()
    with pytest.raises(ValueError, match="two"):
        list(as_done(work, 100, 3))
    assert time.monotonic() - start < 2 and len(begun) < 10
    assert sorted(as_done(lambda i, stopped: i * i, 4, 2)) == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert list(as_done(work, 0, 2)) == []


# Training.


def server_config(files, directory, fake, **sections):
    values = {"rollout": {"engine": "vllm_server", "server": fake.address, "server_patience": 0.4}}
    return short_config(*files, directory, **merge(values, sections))


@pytest.mark.parametrize("method", ["opsd", "grpo"])
def test_training_by_a_server(method, fake, files, tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.training.run.Grader", lambda strict: AlternatelyRight())
    config = server_config(
        files, tmp_path / "run", fake, method=method, rollout={"group_size": 2, "top_k": 20}
    )
    train(config, quiet())
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 4
    for line in metrics:
        if line["trained_tokens"] == 0:
            continue
        # fp32 on both sides: only the order of sums differs.
        assert abs(line["importance_ratio"] - 1) < 1e-4 and abs(line["engine_divergence"]) < 1e-4
        assert line["importance_truncated_fraction"] == 0
        assert line["sync_bytes"] == sum(w.nbytes for w in fake.reloads[-1].values())
        assert 0 < line["sync_seconds"] < line["rollout_seconds"]
    # Before each sampling: 4 steps, evaluations at 0, 2 and 4.
    assert len(fake.reloads) == 7
    last = load_file(tmp_path / "run" / "model" / "model.safetensors")
    last["lm_head.weight"] = last["model.embed_tokens.weight"]  # tied
    assert all(torch.equal(w, last[name]) for name, w in fake.reloads[-1].items())
    for sample in read_lines(tmp_path / "run" / "samples.jsonl"):
        how = sample["sampling"]
        assert how["engine"] == "vllm_server" and how["temperature"] == 0
        assert how["software"] == "vLLM 0.32.0 torch.float32 cpu"
        assert how["max_new_tokens"] == 6 and how["seed"] is None  # greedy
    rollouts = read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert {line["sampling"]["engine"] for line in rollouts} == {"vllm_server"}
    seeds = [line["sampling"]["seed"] for line in rollouts]
    assert len(set(seeds)) == len(seeds) == 16 and None not in seeds
    assert not (tmp_path / "run" / "weights-for-vllm").exists()


class AlternatelyRight:
    """Stands in for the grader: every other answer is right, so that groups differ."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def grade(self, completions, answers):
        from opsd.grading.grader import Grade

        return [Grade(i % 2 == 0, "", None) for i in range(len(completions))]


@pytest.mark.parametrize(
    "completions, step",
    [(2, 0), (4 + 3 + 1, 1), (4 + 2 * 3 + 2, 2), (4 + 2 * 3 + 4 + 3 + 2, 3)],
    ids=["before", "in a step", "in an evaluation", "in the last step"],
)
def test_a_run_whose_server_dies_goes_on_where_it_was(
    completions, step, straight, fake, files, tmp_path
):
    broken = server_config(files, tmp_path / "broken", fake)
    fake.dies_after = completions
    with pytest.raises(ServerGoneError) as caught:
        train(broken, quiet())
    if step:
        assert f"step {step} is saved" in str(caught.value) and "--resume" in str(caught.value)
        assert (tmp_path / "broken" / f"checkpoint-{step}").is_dir()
    assert not (tmp_path / "broken" / "weights-for-vllm").exists()
    fake.dies_after = None
    train(broken, quiet(), resume=True)
    assert outcome(tmp_path / "broken") == outcome(straight)


@pytest.mark.parametrize("completion", [4 + 3 + 2, 4 + 2 * 3 + 3], ids=["step", "evaluation"])
def test_a_server_that_starts_anew_is_given_the_weights_again(
    completion, straight, fake, files, tmp_path
):
    """It answers again at once, but by the weights that it starts with."""
    fake.restarts_at = completion
    train(server_config(files, tmp_path / "run", fake), quiet())
    assert fake.instance == 1 and len(fake.reloads) == 8  # one more than before each sampling
    assert outcome(tmp_path / "run") == outcome(straight)


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """A run whose server stays."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    fake = FakeVLLM(files[0])
    train(server_config(files, directory, fake), quiet())
    fake.stop()
    return directory


def outcome(directory):
    """Steps with their losses, evaluations, and the final weights, to the bit."""
    metrics, evaluations = (
        read_lines(directory / f"{name}.jsonl") for name in ("metrics", "evaluations")
    )
    weights = load_file(directory / "model" / "model.safetensors")
    assert len(metrics) == 4 and len(evaluations) == 3
    return (
        [(line["step"], line["loss"], line["generated_tokens"]) for line in metrics],
        [(line["step"], line["accuracy"], line["mean_length"]) for line in evaluations],
        {name: weight.tolist() for name, weight in weights.items()},
    )


def test_a_server_with_other_weights_is_found_out(fake, files, tmp_path):
    fake.model.load_state_dict(changed(files, seed=9).state_dict())
    with torch.no_grad():
        for parameter in fake.model.parameters():
            parameter *= 3
    fake.loads = False
    config = server_config(files, tmp_path / "run", fake, eval={"problems": 0})
    with pytest.raises(UserError, match=r"rollout\.engine is 'vllm_server': its log-prob.* differ"):
        train(config, quiet())


# Refusals, by name, before a weight is loaded.


def test_vllm_without_a_gpu_is_refused(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values = merge(short_values(*files, tmp_path / "run"), {"rollout": {"engine": "vllm"}})
    values["model"]["path"] = str(tmp_path / "no weights")
    (tmp_path / "no weights").mkdir()
    (tmp_path / "no weights" / "config.json").write_text("{}")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values))
    assert main(["train", str(config)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("opsd: rollout.engine is 'vllm'") and "GPU" in message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="not installed"):
        check_engine("vllm")


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"rollout": {"engine": "vllm_server"}}, r"rollout\.server is missing"),
        ({"rollout": {"server": "http://a:1"}}, r"rollout\.server is 'http://a:1'.*vllm_server"),
        ({"rollout": {"weights_dir": "/dev/shm"}}, r"rollout\.weights_dir is '/dev/shm'"),
        ({"rollout": {"engine": "vllm_server", "server": "file:///etc"}}, "must look like http"),
        ({"rollout": {"engine": "vllm_server", "server": "http://a:1/v1"}}, "without /v1"),
        ({"rollout": {"engine": "vllm", "source": "teacher"}}, r"rollout\.source 'teacher'"),
        ({"rollout": {"engine": "vllm"}, "model": {"gguf_file": "a.gguf"}}, "gguf_file"),
        (
            {"rollout": {"engine": "vllm", "temperature": 2.5}},
            r"rollout\.temperature is 2\.5: vLLM",
        ),
        ({"loss": {"importance_bound": 0}}, "importance_bound"),
    ],
)
def test_combinations_that_make_no_sense(sections, said, files, tmp_path):
    with pytest.raises(UserError, match=said):
        parse_config(merge(short_values(*files, tmp_path / "run"), sections))


def test_a_server_with_another_model_is_refused(fake, files, wider, tmp_path, capsys):
    said = f"serves '{files[0]}', of width 64 with 27 tokens; '{wider}' is of width 48 with 128"
    config = server_config((wider, files[1]), tmp_path / "run", fake)
    with pytest.raises(UserError) as caught:
        train(config, quiet())
    asked = ["--engine", "vllm_server", "--server", fake.address, "--output", str(tmp_path / "o")]
    assert main(["eval", str(wider), "--benchmark", str(files[1]), *asked]) == 1
    assert said in str(caught.value) and said in capsys.readouterr().err
    assert not fake.reloads


def test_a_server_that_cannot_follow_is_refused(fake, files, tmp_path):
    config = server_config(files, tmp_path / "run", fake)
    fake.dev = False
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        train(config, quiet())
    fake.dev, fake.mode = True, "processed_logprobs"
    with pytest.raises(UserError, match="--logprobs-mode is 'processed_logprobs'"):
        train(config, quiet())
    fake.stop()
    with pytest.raises(ServerGoneError, match="cannot be reached"):
        train(config, quiet())


# Evaluation.


def evaluated(files, output, *more) -> list[str]:
    arguments = ["eval", str(files[0]), "--benchmark", str(files[1]), "--output", str(output)]
    arguments += ["--problems", "5", "--max-new-tokens", "8", "--prompt", tiny.STUDENT_PROMPT]
    assert main([*arguments, *more]) == 0
    return [line["completion"] for line in read_lines(output / "answers.jsonl")]


@pytest.mark.parametrize("dev", [True, False])
def test_evaluation_by_a_server(dev, fake, files, tmp_path):
    if dev:  # an earlier run has left other weights there, and what it computed with them
        fake.model.load_state_dict(changed(files, seed=9).state_dict())
    fake.dev = dev
    server = ["--engine", "vllm_server", "--server", fake.address]
    assert evaluated(files, tmp_path / "server", *server) == evaluated(files, tmp_path / "own")
    assert len(fake.completions()) == 5 and len(fake.reloads) == dev
    result = json.loads((tmp_path / "server" / "result.json").read_text())
    assert result["precision"] == "the vLLM server's"
    sampled = ["--samples", "3", "--temperature", "1.2"]
    first = evaluated(files, tmp_path / "a", *server, *sampled)
    assert evaluated(files, tmp_path / "b", *server, *sampled) == first and len(set(first)) > 5


def test_evaluation_of_what_a_server_does_not_serve(fake, files, tmp_path, capsys):
    other = write_model(tmp_path / "other", seed=2)
    fake.dev = False
    arguments = [
        "--engine",
        "vllm_server",
        "--server",
        fake.address,
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["eval", str(other), "--benchmark", str(files[1]), *arguments]) == 1
    assert f"it serves '{files[0]}', not '{other}'" in capsys.readouterr().err
