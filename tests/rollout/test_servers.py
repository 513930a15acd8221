"""What every server that samples does, whichever dialect it speaks: one test for all of them, each
against a stand-in made from its real sources."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers.lines import read_lines
from helpers.sglang_server import FakeSGLang
from helpers.training_cases import changed, logits, quiet, short_config, write_wider_model
from helpers.vllm_server import FakeVLLM
from safetensors.torch import load_file

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.http import ServerGoneError
from opsd.config.load import merge
from opsd.models.load import stop_ids
from opsd.objectives import Totals
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import GenerateSampler, RolloutServer, Sampling, ServerRestartedError
from opsd.rollout.engines import DIALECTS, training_server
from opsd.rollout.server import Request
from opsd.rollout.vllm_server import ServerSampler
from opsd.training.engine_check import EngineCheck
from opsd.training.run import train

pytestmark = pytest.mark.usefixtures("no_report")

FAKES = {"vllm_server": FakeVLLM, "sglang_server": FakeSGLang}


@pytest.fixture(params=DIALECTS)
def fake(request, files):
    server = FAKES[request.param](files[0])
    server.engine = request.param
    yield server
    server.stop()


@pytest.fixture
def sglang(files):
    server = FakeSGLang(files[0])
    server.engine = "sglang_server"
    yield server
    server.stop()


def client(fake, **more) -> RolloutServer:
    return DIALECTS[fake.engine](fake.address, **{"timeout": 5.0, "patience": 0.4, **more})


def sampler(fake, student, directory, dtype=torch.float32, **more) -> ServerSampler:
    return ServerSampler(client(fake, **more), stop_ids(*student), directory / "weights", dtype)


def seed_of(body):
    return body["seed"] if "seed" in body else body["sampling_params"].get("sampling_seed")


def server_config(files, directory, fake, **sections):
    values = {
        "rollout": {"engine": fake.engine, "server": fake.address, "server_patience": 0.4},
    }
    return short_config(*files, directory, **merge(values, sections))


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
    fake.original = True  # of SGLang, which gives those after temperature by default
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
    assert {seed_of(body) for body in fake.completions()[:6]} == {r.seed for r in first}


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
    assert len(fake.reloads) == 2
    named = [str(body) for route, body in fake.requests if "rpc" in route or "update" in route]
    assert len(set(named)) == 2  # a server may keep what it has read from a path


def test_what_the_server_would_cut_is_not_asked(fake, student, contexts, tmp_path):
    with pytest.raises(UserError, match=f"a window of {client(fake).window} tokens"):
        sampler(fake, student, tmp_path).sample(contexts, Sampling(125))
    assert not fake.completions()


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
    fake.delay = 60.0
    threading.Timer(0.5, lambda: setattr(fake, "delay", 0.0)).start()
    begun = time.monotonic()
    (rollout,) = engine.sample(contexts[:1], Sampling(4, temperature=0))
    assert len(rollout.ids) == 4 or rollout.finished
    assert time.monotonic() - begun < 40 and len(fake.completions()) >= 2


@pytest.mark.parametrize("engine", DIALECTS)
def test_another_server_on_that_port_is_one(engine):
    """One that shows pages: what it says is told without its tags, and without a wrong advice."""
    answer = {"do_GET": lambda self: self.send_error(404)}
    handler = type("Handler", (BaseHTTPRequestHandler,), answer)
    pages = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=pages.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(UserError) as caught:
        DIALECTS[engine](f"http://127.0.0.1:{pages.server_port}", patience=60.0)
    pages.shutdown()
    pages.server_close()
    said = str(caught.value)
    assert "answers 404: Error response" in said and "<" not in said
    assert said.endswith("; another server is there: correct the address")


def test_a_server_that_stays_away_is_given_up(fake, student, contexts, tmp_path, capfd):
    """Of the wait, which may be 15 minutes, a line tells at once, with what to do."""
    engine = sampler(fake, student, tmp_path)
    fake.stop()
    state = torch.get_rng_state()
    begun = time.monotonic()
    with pytest.raises(ServerGoneError, match=r"rollout\.server is 'http://127.*cannot be reached"):
        engine.sample(contexts * 100, Sampling(4, batch_size=4))
    assert time.monotonic() - begun < 20  # not once for each of the 600, which takes a minute
    assert torch.equal(torch.get_rng_state(), state)
    (line,) = (one for one in capfd.readouterr().err.splitlines() if fake.address in one)
    assert "asked again for 0.4 s: start it, or correct the address" in line


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
    """A run whose server stays. Both dialects' stand-ins draw the same from a seed."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    fake = FakeVLLM(files[0])
    fake.engine = "vllm_server"
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


def test_a_run_says_who_sampled(fake, files, straight, tmp_path):
    config = server_config(files, tmp_path / "run", fake, rollout={"ahead": 1})
    train(config, quiet())
    lines = read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert {line["sampling"]["engine"] for line in lines} == {fake.engine}
    assert all(line["sampling"]["seed"] is not None for line in lines)
    said = {line["sampling"]["software"] for line in lines}
    assert said <= {"vLLM 0.32.0 torch.float32 cpu", "SGLang 0.5.23 auto cuda deterministic"}
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["rollout_age"] for line in metrics] == [0, 1, 1, 1]


def test_evaluation(fake, files, tmp_path):
    """By the weights that it is told to load, whatever an earlier run has left there."""
    fake.model.load_state_dict(changed(files, seed=9).state_dict())
    arguments = ["eval", str(files[0]), "--benchmark", str(files[1]), "--problems", "5"]
    arguments += ["--max-new-tokens", "8", "--prompt", tiny.STUDENT_PROMPT]
    by_server = ["--engine", fake.engine, "--server", fake.address]
    places = {"server": by_server, "own": []}
    for name, how in places.items():
        assert main([*arguments, *how, "--output", str(tmp_path / name)]) == 0
    texts = [
        [line["completion"] for line in read_lines(tmp_path / name / "answers.jsonl")]
        for name in places
    ]
    assert texts[0] == texts[1] and len(fake.completions()) == 5
    result = json.loads((tmp_path / "server" / "result.json").read_text())
    assert result["precision"].endswith("server's")


def test_weights_that_do_not_load_are_one_line(fake, tmp_path):
    with pytest.raises(UserError, match=r"has not loaded '.*check that it sees that path"):
        client(fake, patience=60.0).load(tmp_path)


# SGLang's own.


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_log_probabilities_after_temperature_are_refused(temperature, sglang, files, tmp_path):
    config = server_config(files, tmp_path / "run", sglang, rollout={"temperature": temperature})
    said = rf"after temperature, and rollout\.temperature is {temperature}.*ORIGINAL_LOGPROB=1"
    with pytest.raises(UserError, match=said):
        train(config, quiet())
    assert not sglang.reloads
    sglang.original = True
    train(config, quiet())
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert abs(line["engine_divergence"]) < 1e-4


def test_at_temperature_1_there_is_nothing_to_ask(sglang, files, tmp_path):
    client(sglang).check_log_probs(1.0)
    assert not sglang.completions()


def test_without_deterministic_inference_there_are_no_seeds(sglang, student, contexts, tmp_path):
    sglang.deterministic, notes = False, []
    section = server_config((student[0].name_or_path, "rows"), tmp_path / "run", sglang)
    training_server(section.rollout, section.model, student[0], notes.append)
    assert "--enable-deterministic-inference" in notes[0]
    engine = sampler(sglang, student, tmp_path)
    torch.manual_seed(3)
    first = engine.sample(contexts, Sampling(8))
    assert {r.seed for r in first} == {None} and engine.software == "SGLang 0.5.23 auto cuda"
    assert all("sampling_seed" not in body["sampling_params"] for body in sglang.completions())


def test_its_window_may_not_be_filled(sglang, student, contexts, tmp_path):
    engine, context = sampler(sglang, student, tmp_path), contexts[0]
    engine.sample([context], Sampling(126 - len(context)))
    with pytest.raises(UserError, match="a window of 126 tokens"):
        engine.sample([context], Sampling(127 - len(context)))


def test_every_answer_names_its_weights(sglang, student, contexts, tmp_path):
    """A server that somebody else gives weights to is found out by the answer itself."""
    engine = sampler(sglang, student, tmp_path)
    engine.sync_weights(student[0])
    engine.sample(contexts, Sampling(4))
    assert "/flush_cache" in [route for route, _ in sglang.requests]
    sglang.version = "somebody-elses"
    with pytest.raises(ServerRestartedError, match="or given other weights"):
        engine.server.complete(Request(contexts[0], Sampling(4), 0, stop_ids(*student)))
    sglang.version_known = False
    with pytest.raises(UserError, match="an SGLang that knows weight_version"):
        engine.sync_weights(student[0])


def test_a_server_that_is_starting_is_waited_for(sglang):
    sglang.starting = 2
    assert client(sglang, patience=20.0).info.version == "0.5.23"


def test_older_names_of_its_routes(sglang, student, contexts, tmp_path):
    sglang.older = True
    engine = sampler(sglang, student, tmp_path)
    engine.sync_weights(student[0])
    assert engine.sample(contexts, Sampling(4)) and engine.software.startswith("SGLang 0.5.23")


def test_a_request_that_is_still_in_a_queue_delays_the_flush_alone(sglang, files):
    """As the real server was seen to have it just after it had answered."""
    sglang.queued = 1
    server = client(sglang, patience=20.0)
    server.load(files[0])
    routes = [route for route, _ in sglang.requests]
    assert routes.count("/flush_cache") == 2 and len(sglang.reloads) == 1
    server.check_restart()


def test_weights_that_do_not_fit_are_not_sent(sglang, files, tmp_path):
    """They would end it."""
    wide = write_wider_model(tmp_path / "wide")
    config = server_config((wide, files[1]), tmp_path / "run", sglang)
    said = rf"of width 64 with 27 tokens; '{wide}' is of width 48 with 128: start it on that"
    with pytest.raises(UserError, match=said):
        train(config, quiet())
    assert not sglang.reloads and not sglang.ended
    sglang.model.config.model_type = "llama"
    with pytest.raises(UserError, match=r"a 'llama'; '.*' is a 'qwen3': start it on that"):
        train(config, quiet())


def test_a_model_on_another_machine_has_unknown_sizes(sglang, student, tmp_path, monkeypatch):
    server = client(sglang)
    monkeypatch.setattr(server, "root", "/not/on/this/machine")
    server.check_model(student[0].config, "model")
    monkeypatch.setattr(server, "root", str(tmp_path))  # a directory without a model
    server.check_model(student[0].config, "model")
    for said in ("[]", '{"model_type": 7}', "[" * 9999):
        (tmp_path / "config.json").write_text(said)
        server.check_model(student[0].config, "model")


def test_a_server_that_names_a_model_with_code_of_its_own_runs_none(
    sglang, student, tmp_path, monkeypatch
):
    """Nor does transformers ask whether to run it, which takes 15 s."""
    told = {"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}, "hidden_size": 7}
    (tmp_path / "config.json").write_text(json.dumps(told))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    server = client(sglang)
    server.root = str(tmp_path)
    asked: list = []
    monkeypatch.setattr("builtins.input", lambda *said: asked.append(said) or "y")
    server.check_model(student[0].config, "model")
    assert not asked and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ahead", [0, 1])
def test_weights_that_stay_old_stop_the_run_at_any_step(ahead, tmp_path):
    """Ahead, one step may explain it: the second in a row does not."""

    def totals(difference):
        made = Totals()
        made.add(4, engine_divergence=torch.tensor(difference))
        return made

    rollout = {"engine": "vllm_server", "server": "http://a", "ahead": ahead}
    config = short_config(tmp_path, tmp_path, tmp_path, rollout=rollout)
    said = []
    check = EngineCheck(config, said.append)
    check(totals(0.01), 1)
    assert not said
    check(totals(0.05), 7)
    assert len(said) == 1 and "step 7" in said[0]
    if ahead:
        check(totals(0.3), 8)
        assert len(said) == 2
        check(totals(0.01), 9)
        check(totals(0.3), 10)
    with pytest.raises(UserError, match=r"0\.31 a token in the mean .*other weights"):
        check(totals(0.31), 11)
