"""Rollouts by a vLLM server: one that speaks its API, as it is and as it fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import (
    RightEvery,
    changed,
    load_student,
    quiet,
    short_config,
    short_values,
    write_model,
)
from helpers.vllm_server import FakeVLLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.http import ServerAnswerError, ServerGoneError
from opsd.config.load import merge, parse_config
from opsd.config.sections import RolloutSection
from opsd.models.load import stop_ids
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import Rollout, Sampling, check_engine, weights_directory
from opsd.rollout.server import Request
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


# A server that fails.


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
        server.complete(Request(context, Sampling(4), 0, stop_ids(*student)))
    assert not isinstance(caught.value, ServerGoneError) and len(fake.completions()) == 1


def test_weights_that_the_server_cannot_read_are_an_error_at_once(fake, tmp_path):
    """It looks for them on the hub, says so, and ends: no reader would guess why."""
    with pytest.raises(UserError, match=r"has not loaded '.*', and must be restarted: check"):
        client(fake, patience=60.0).load(tmp_path)


def test_threads_raise_the_first_error_and_begin_no_more():
    begun = []

    def work(i, stopped):
        begun.append(i)
        if i == 2:
            raise ValueError("two")
        stopped.wait(60 if i < 2 else 0)
        return i

    start = time.monotonic()
    with pytest.raises(ValueError, match="two"):
        list(as_done(work, 100, 3))
    assert time.monotonic() - start < 30 and len(begun) < 10
    assert sorted(as_done(lambda i, stopped: i * i, 4, 2)) == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert list(as_done(work, 0, 2)) == []


# Training.


def server_config(files, directory, fake, **sections):
    values = {"rollout": {"engine": "vllm_server", "server": fake.address, "server_patience": 0.4}}
    return short_config(*files, directory, **merge(values, sections))


@pytest.mark.parametrize("method", ["opsd", "grpo"])
def test_training_by_a_server(method, fake, files, tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.training.run.Grader", lambda strict: RightEvery(2))
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
        given = sum(weight.nbytes for weight in fake.reloads[-1].values())
        assert given < line["sync_bytes"] < given + 10_000  # safetensors' header
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


@pytest.mark.parametrize("restarts_at", [None, 4 + 3 + 2], ids=["", "restart"])
def test_training_of_adapters_gives_the_server_these_alone(restarts_at, fake, files, tmp_path):
    """And what they stand on once, or where the server has started anew."""
    fake.rank, fake.may_adapt, fake.restarts_at = 8, True, restarts_at
    lora = {"lora": {"rank": 8, "alpha": 8}}
    train(server_config(files, tmp_path / "run", fake, model=lora), quiet())
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    for line in metrics[2 if restarts_at else 0 :]:
        assert abs(line["engine_divergence"]) < 1e-4
        assert 0 < line["sync_bytes"] - sum(w.nbytes for w in saved.values()) < 10_000  # header
    assert len(fake.reloads) == (2 if restarts_at else 1)
    resets = [route for route, _ in fake.requests if route == "/reset_prefix_cache"]
    assert len(resets) == (2 + 8 if restarts_at else 1 + 7)  # after each loading of either
    first, last = load_file(files[0] / "model.safetensors"), fake.reloads[-1]
    assert all(torch.equal(last[name], weight) for name, weight in first.items())
    served = fake.adapted["opsd"].state_dict()
    for name, weight in saved.items():
        assert torch.equal(served[name.replace(".weight", ".default.weight")], weight)


@pytest.mark.parametrize("rank, may_adapt", [(4, True), (8, False), (0, True)])
def test_a_server_that_takes_no_such_adapters_is_given_all_weights(
    rank, may_adapt, fake, files, tmp_path
):
    fake.rank, fake.may_adapt = rank, may_adapt
    lora = {"lora": {"rank": 8, "alpha": 8}}
    train(server_config(files, tmp_path / "run", fake, model=lora), quiet())
    assert len(fake.reloads) == 7 and not fake.adapted
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert abs(line["engine_divergence"]) < 1e-4


def test_weights_are_written_to_no_place_that_somebody_else_made(tmp_path):
    """In a directory that is everybody's, such as /dev/shm: a link, or a directory."""
    (tmp_path / "elsewhere").mkdir()
    server = SimpleNamespace(engine="vllm_server", address="a", software="s", adapts=False)
    for made in ("symlink_to", "mkdir"):
        place = tmp_path / made
        sampler = ServerSampler(server, frozenset(), place)
        getattr(place, made)(*[tmp_path / "elsewhere"] * (made == "symlink_to"))
        with pytest.raises(UserError, match=f"{made}' was not made by this run"):
            sampler._give(lambda new: (new / "weights").touch(), lambda new: None)
    assert not [*(tmp_path / "elsewhere").iterdir()] and not [*(tmp_path / "mkdir").iterdir()]


def test_a_rollout_that_vllm_cut_tells_both_of_its_options():
    server = object.__new__(VLLMServer)
    server.address, server.field = "http://a", "rollout.server"
    cut = Rollout([1], False, [-1.0])
    with pytest.raises(ServerAnswerError, match="--max-model-len, and with --generation-config v"):
        server._checked(cut, "length", Request([1], Sampling(4)))


def test_weights_that_a_killed_run_left_in_memory_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_directory, "MEMORY", tmp_path)
    code = "import sys, time; from pathlib import Path; from opsd.rollout import weights_directory "
    code += "as w; file = w.held(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    killed, lives, young, other = (tmp_path / f"opsd-{n}" for n in range(4))
    for place in (killed, lives, young, other):
        (place / "1").mkdir(parents=True)
    holders = [
        subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE)
        for place in (killed, lives)
    ]
    for process in holders:
        process.stdout.readline()
    holders[0].kill()
    holders[0].wait()
    for place in (killed, lives, other):
        os.utime(place, (1e9, 1e9))
    (young / weights_directory.LOCK).touch()
    weights_directory.remove_left()
    assert not killed.exists() and lives.exists() and young.exists()
    assert other.exists()  # without a lock, so another program's
    (other / weights_directory.LOCK).touch()
    holders[1].kill()
    holders[1].communicate()
    os.utime(lives, (1e9, 1e9))
    os.utime(other, (1e9, 1e9))
    monkeypatch.setattr(os, "getuid", lambda: -1)  # another user's
    weights_directory.remove_left()
    assert lives.exists() and other.exists()


def test_weights_lie_in_memory_where_the_server_surely_sees_it(monkeypatch, tmp_path):
    """A process of its own that is called as vLLM's server is, and one that is not."""
    monkeypatch.setattr(weights_directory, "MEMORY", tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    listen = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); "
    listen += "print(s.getsockname()[1], flush=True); time.sleep(60)"

    def where(port: str, needed: int = 1, host: str = "localhost", **more) -> Path:
        section = RolloutSection(engine="vllm_server", server=f"http://{host}:{port}", **more)
        return weights_directory.weights_directory(section, tmp_path / "run", needed)

    for called, seen in (("vllm serve", True), ("ssh -L", False)):
        command = [sys.executable, "-c", listen, *called.split()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            port = process.stdout.readline().strip()
            on_disk = tmp_path / "run" / "weights-for-vllm"
            assert (where(port).parent == tmp_path / "memory") is seen
            assert seen or where(port) == on_disk
            assert where(port, needed=10**15) == where(port, host="gpu-7") == on_disk
            assert where(port, weights_dir="/data").parent == Path("/data")
            with monkeypatch.context() as patch:  # as in a container of its own
                patch.setattr(os, "readlink", str)
                assert where(port) == on_disk
            process.kill()
    assert where(port) == on_disk  # nobody listens


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
    with pytest.raises(UserError, match="the server has --logprobs-mode 'processed_logprobs'"):
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


def test_evaluation_of_an_adapter_by_a_server(fake, files, tmp_path):
    """It is given the weights, merged: vLLM ends where it cannot read what it is told to load."""
    import peft

    torch.manual_seed(0)
    strong = {"lora_alpha": 400, "init_lora_weights": False}
    random = peft.LoraConfig(target_modules=["q_proj", "down_proj"], **strong)
    model = AutoModelForCausalLM.from_pretrained(files[0])
    peft.get_peft_model(model, random).save_pretrained(tmp_path / "adapter")
    load_student(files)[1].save_pretrained(tmp_path / "adapter")
    fake.on_cpu, adapter = False, (tmp_path / "adapter", files[1])
    server = ["--engine", "vllm_server", "--server", fake.address]
    own = evaluated(adapter, tmp_path / "own")
    assert evaluated(adapter, tmp_path / "server", *server) == own
    assert own != evaluated(files, tmp_path / "base")


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
