"""The real vLLM and SGLang, for who asks for them:

    OPSD_VLLM_PYTHON=VENV/bin/python pytest -m vllm        # tests/helpers/vllm_venv.sh
    OPSD_SGLANG_PYTHON=VENV/bin/python pytest -m sglang    # tests/helpers/sglang_venv.sh

OPSD_SERVED_MODEL: a directory; none is a tiny random model.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.lines import read_lines
from helpers.real_servers import QUIET_VLLM, RealSGLang, RealVLLM, environment
from helpers.training_cases import ROWS, RightEvery, make_model, quiet, short_config, write_rows

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.http import ServerGoneError
from opsd.common.weight_stream import offered
from opsd.config.load import merge, save_config
from opsd.config.sections import ModelSection
from opsd.models.load import load_model, stop_ids
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import GenerateSampler, Sampling
from opsd.rollout.server import Request, ServerRestartedError
from opsd.rollout.vllm_server import ServerSampler
from opsd.training.run import train

pytestmark = pytest.mark.usefixtures("no_report")
MODEL = os.environ.get("OPSD_SERVED_MODEL")
VLLM = pytest.param(RealVLLM, marks=pytest.mark.vllm, id="vllm")
SGLANG = pytest.param(RealSGLang, marks=pytest.mark.sglang, id="sglang")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model that vLLM's attention on a CPU takes, which wants heads of 32 at least; rows."""
    directory = tmp_path_factory.mktemp("base")
    if MODEL:
        return Path(MODEL), write_rows(directory / "rows.jsonl")
    tokenizer = tiny.make_tokenizer()
    make_model(0, tokenizer, head_dim=32).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    return directory / "model", write_rows(directory / "rows.jsonl")


@pytest.fixture(scope="module", params=[VLLM, SGLANG])
def server(request, files, tmp_path_factory):
    """One of each for the module. A test that kills it starts it again."""
    server = request.param(files[0], tmp_path_factory.mktemp("server") / "log").start().wait()
    yield server
    server.kill()


on_vllm = pytest.mark.parametrize("server", [VLLM], indirect=True)
on_sglang = pytest.mark.parametrize("server", [SGLANG], indirect=True)


def config_of(files, directory, server, **sections):
    values = {
        "rollout": {
            "engine": server and server.engine,
            "server": server and server.address,
            "server_patience": 5,
            "group_size": 2,
            "max_new_tokens": 24,
        },
        "train": {"steps": 20, "save_every": 5},
        "eval": {"every": 10},
    }
    return short_config(*files, directory, **merge(values, sections))


def check(directory, steps=20):
    """Each step is there once, and the server sampled by the weights that trained."""
    metrics = read_lines(directory / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    for line in metrics:
        if line["trained_tokens"]:
            assert 0.995 <= line["importance_ratio"] <= 1.005, line
            assert abs(line["engine_divergence"]) < 1e-4, line


def check_served(server, directory, adapts=False):
    """The server's greedy completions are those of the model that was saved, 12 of 12. Two tokens
    that are equally likely to 1e-3 may be either."""
    model, tokenizer = load_model(ModelSection(path=str(directory / "model")))
    stops = stop_ids(model, tokenizer)
    contexts = [tokenizer(f"Q:{row.problem}").input_ids for row in ROWS[:12]]
    sampling = Sampling(24, temperature=0)
    client = server.client(server.address)
    served = ServerSampler(client, stops, adapts=adapts).sample(contexts, sampling)
    own = GenerateSampler(model, stops).sample(contexts, sampling)
    for context, theirs, ours in zip(contexts, served, own, strict=True):
        if theirs.ids != ours.ids:
            place = next(
                i for i, (a, b) in enumerate(zip(theirs.ids, ours.ids, strict=False)) if a != b
            )
            before = torch.tensor([[*context, *ours.ids[:place]]])
            with torch.no_grad():
                first, second = model(before).logits[0, -1].topk(2).values.tolist()
            assert first - second < 1e-3, (theirs, ours)


@pytest.mark.parametrize("method", ["opsd", "grpo"])
def test_training(method, server, files, tmp_path, monkeypatch):
    """After the last of which the server is given the weights once more, for an evaluation. grpo
    draws further problems in a step (dynamic sampling), since every other group is all wrong."""
    monkeypatch.setattr("opsd.training.run.Grader", lambda strict: RightEvery(4))
    steps = 20 if method == "opsd" else 5
    more = {"train": {"steps": steps}, "method": method}
    if method == "grpo":
        more["rollout"] = {"dynamic_sampling": 2}
    train(config_of(files, tmp_path / "run", server, **more), quiet())
    check(tmp_path / "run", steps)
    check_served(server, tmp_path / "run")
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["trained_tokens"]
    if method == "grpo":  # the groups that were all wrong were drawn, and left out
        assert last["generated_tokens"] > last["trained_tokens"]


def test_kills_of_the_server(server, files, tmp_path):
    """At five moments of a run, which begins while the server still starts: each time it stops in
    one line with a checkpoint, and goes on when another server has started in its place."""
    run, rng, many = tmp_path / "run", random.Random(0), {"train": {"steps": 60}}
    patient = {"rollout": {"server_patience": 600}}  # while the server starts
    for kill in range(5):
        server.kill()
        server.start()
        if kill == 0:  # a run that is told to wait does
            train(config_of(files, tmp_path / "first", server, **merge(patient, SHORT)), quiet())
        server.wait()
        config = config_of(files, run, server, **many)
        stop = threading.Event()
        after = rng.uniform(0.0, 1.5)
        steps = len(read_lines(run / "metrics.jsonl")) if kill else 0
        killer = threading.Thread(target=kill_at, args=(server, run, steps + 2, after, stop))
        killer.start()
        try:
            with pytest.raises(ServerGoneError, match=r"Training has stopped, .*--resume"):
                train(config, quiet(), resume=kill > 0)
        finally:
            stop.set()
            killer.join()
        assert not (run / "weights-for-vllm").exists()
    server.start().wait()
    train(config, quiet(), resume=True)
    check(run, 60)
    check_served(server, run)


@on_vllm
def test_adapters(server, files, tmp_path):
    """The server is given the weights once, then adapters alone; and both when it starts anew."""
    server.kill()
    takes = RealVLLM(files[0], server.log, "--enable-lora", "--max-lora-rank", "8")
    lora, run = {"rank": 8, "alpha": 16}, tmp_path / "run"
    config = config_of(files, run, takes.start().wait(), model={"lora": lora})
    try:
        train(config, quiet())
        check(run)
        check_served(takes, run, adapts=True)
        assert read_lines(run / "metrics.jsonl")[-1]["sync_bytes"] < 200_000
    finally:
        takes.kill()
        server.start().wait()


@on_vllm
def test_weights_over_tcp(server, files, tmp_path):
    """No file is written; and a server that cannot connect back still has its weights."""
    server.kill()
    more = ("--worker-extension-cls", "opsd.common.weight_stream.WeightReceiver")
    ours = str(Path(__file__).parents[2])
    receives, run = RealVLLM(files[0], server.log, *more, PYTHONPATH=ours), tmp_path / "run"
    try:
        train(config_of(files, run, receives.start().wait()), quiet())
        check(run)
        check_served(receives, run)
        assert read_lines(run / "metrics.jsonl")[-1]["sync_bytes"] > 400_000
        client = receives.client(receives.address)
        with offered(dict, "127.0.0.1") as over:
            pass
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("opsd.rollout.vllm_client.offered", lambda *_: nullcontext(over))
            with pytest.raises(UserError, match=r"Connection refused.*both see"):
                client.send(dict)
        check_served(receives, run)
    finally:
        receives.kill()
        server.start().wait()


SHORT = {"train": {"steps": 1}, "eval": {"problems": 0}}


def kill_at(server, run, steps, seconds, stop):
    """Kill the server so many seconds after the run's log has so many steps."""
    log = run / "metrics.jsonl"
    while not stop.is_set() and (not log.exists() or len(log.read_text().splitlines()) < steps):
        time.sleep(0.02)
    if not stop.wait(seconds):
        server.kill()


def test_stops_of_the_run(server, files, tmp_path):
    """Ctrl-C at five moments, each time with a resume: the server keeps on."""
    run, rng = tmp_path / "run", random.Random(1)
    many = {"train": {"steps": 60}}
    config, file = config_of(files, run, server, **many), tmp_path / "config.yaml"
    save_config(config, file)
    for stop in range(5):
        steps = len(read_lines(run / "metrics.jsonl")) if stop else 0
        more = ["--resume"] if stop else []
        process = subprocess.Popen([sys.executable, "-m", "opsd", "train", str(file), *more])
        log, wanted = run / "metrics.jsonl", steps + 2
        while not log.exists() or len(log.read_text().splitlines()) < wanted:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.0))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    train(config, quiet(), resume=True)
    check(run, 60)
    check_served(server, run)


def test_evaluation(server, files, tmp_path):
    """By weights that the server has not had before, tied head and all."""
    other = tmp_path / "other"
    model, tokenizer = load_model(ModelSection(path=str(files[0])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    arguments = ["eval", str(other), "--benchmark", str(files[1]), "--problems", "12"]
    arguments += ["--max-new-tokens", "16", "--prompt", tiny.STUDENT_PROMPT, "--output"]
    assert main([*arguments, str(tmp_path / "own")]) == 0
    by_server = ["--engine", server.engine, "--server", server.address]
    assert main([*arguments, str(tmp_path / "server"), *by_server]) == 0
    own, theirs = (
        [line["completion"] for line in read_lines(tmp_path / name / "answers.jsonl")]
        for name in ("own", "server")
    )
    assert sum(a == b for a, b in zip(own, theirs, strict=True)) >= 11  # but for a tie


@on_vllm
def test_what_vllm_refuses(server, files, wider, tmp_path):
    """What the stand-in answers, the real one answers."""
    client = server.client(server.address)
    assert client.software == "vLLM 0.32.0 torch.float32 cpu"
    with pytest.raises(UserError, match="has a window of 256 tokens"):
        client.check_asked(240, Sampling(17))
    model, tokenizer = load_model(ModelSection(path=str(files[0])))
    own, greedy = GenerateSampler(model, stop_ids(model, tokenizer)), Sampling(17, temperature=0)
    contexts = ([token] * 240 for token in range(3, 40))
    endless = next(each for each in contexts if not own.sample([each], greedy)[0].finished)
    with pytest.raises(UserError, match="cut a rollout at 16 tokens"):  # without a word
        complete(client, endless, 17, temperature=0)
    with pytest.raises(UserError, match=r"400: temperature must be in \[0, 2\], got 2\.5"):
        complete(client, [1], 4, temperature=2.5)
    with pytest.raises(UserError, match="400: This model's maximum context length is 256 tokens"):
        complete(client, [1] * 300, 4)
    with pytest.raises(UserError, match=r"of width \d+ with \d+ tokens; '.*' is of width 48"):
        train(config_of((wider, files[1]), tmp_path / "run", server), quiet())
    with pytest.raises(UserError, match="has not loaded '/nowhere', and must be restarted"):
        client.load("/nowhere")
    server.kill()
    server.start().wait()


def complete(client, context, length, stops=frozenset(), **how):
    return client.complete(Request(context, Sampling(length, **how), 3, frozenset(stops)))


@on_sglang
def test_what_sglang_refuses(server, files, wider, tmp_path):
    """What the stand-in answers, the real one answers. The longest rollouts are whole."""
    client = server.client(server.address)
    assert client.software == "SGLang 0.5.23 float32 cpu"
    with pytest.raises(UserError, match="has a window of 254 tokens"):
        client.check_asked(240, Sampling(15))
    assert len(complete(client, [3] * 240, 14, stops=()).ids) == 14
    with pytest.raises(UserError, match="cut a rollout at 14 tokens"):  # without a word
        complete(client, [3] * 240, 15, stops=())
    with pytest.raises(UserError, match="400: temperature must be a non-negative finite number"):
        complete(client, [1], 4, temperature=-1.0)
    with pytest.raises(UserError, match=r"400: The input \(300 tokens\) is longer"):
        complete(client, [1] * 300, 4)
    with pytest.raises(UserError, match=r"of width \d+ with \d+ tokens; '.*' is of width 48"):
        train(config_of((wider, files[1]), tmp_path / "run", server), quiet())
    with pytest.raises(UserError, match="has not loaded '/nowhere': check that it sees that path"):
        client.load("/nowhere")
    train(config_of(files, tmp_path / "after", server, **SHORT), quiet())  # it lives on
    other = complete(client, [3], 4)
    client.load(files[0])
    client._version = "another run's"
    with pytest.raises(ServerRestartedError, match="or given other weights"):
        complete(client, [3], 4)
    assert other.sampling_log_probs


@on_sglang
def test_temperature(server, files, tmp_path):
    """SGLang's log-probabilities are after temperature, unless it was told otherwise."""
    hot = {"rollout": {"temperature": 0.7}, "train": {"steps": 5}}
    with pytest.raises(UserError, match=r"after temperature.*ORIGINAL_LOGPROB=1"):
        train(config_of(files, tmp_path / "run", server, **hot), quiet())
    server.kill()
    own = RealSGLang(files[0], server.log, SGLANG_RETURN_ORIGINAL_LOGPROB="1").start().wait()
    try:
        train(config_of(files, tmp_path / "run", own, **hot), quiet())
        check(tmp_path / "run", 5)
    finally:
        own.kill()
        server.start().wait()


@pytest.mark.vllm
@pytest.mark.parametrize("method", ["opsd", "grpo"])
def test_in_this_process(method, files, tmp_path):
    """`rollout.engine: vllm`, by vLLM's Python; grpo with dynamic sampling."""
    more = {"rollout": {"engine": "vllm", "server": None}, "train": {"steps": 5}}
    if method == "grpo":
        more |= {"method": "grpo"}
        more["rollout"] |= {"dynamic_sampling": 2}
    config = config_of(files, tmp_path / "run", None, **more)
    save_config(config, tmp_path / "config.yaml")
    command = [RealVLLM.python, "-m", "opsd", "train", str(tmp_path / "config.yaml")]
    env = environment(PYTHONPATH=str(Path(__file__).parents[2]), **QUIET_VLLM)
    subprocess.run(command, env=env, check=True, timeout=900)
    check(tmp_path / "run", 5)
    assert "cpu" in json.loads((tmp_path / "run" / "summary.json").read_text())["versions"]["vllm"]
