"""Weights over TCP: what arrives is what was sent, and what breaks off is said."""

import io
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import quiet, short_config
from helpers.vllm_server import FakeVLLM

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.weight_stream import WeightReceiver, offered, read_weights, write_weights
from opsd.models.copies import named_weights
from opsd.models.load import stop_ids
from opsd.rollout import Sampling
from opsd.rollout.vllm_client import VLLMServer
from opsd.rollout.vllm_server import ServerSampler
from opsd.training.run import train

pytestmark = pytest.mark.usefixtures("no_report")

WEIGHTS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "half": torch.randn(5, 2).bfloat16(),
    "transposed": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 7),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "eight": torch.ones(4).to(torch.float8_e4m3fn),
}


def sent(weights=WEIGHTS) -> bytes:
    stream = io.BytesIO()
    write_weights(stream, weights.items())
    return stream.getvalue()


def test_each_tensor_arrives_as_it_is():
    found = dict(read_weights(io.BytesIO(sent())))
    assert found.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        assert (found[name].dtype, found[name].shape) == (weight.dtype, weight.shape)
        assert torch.equal(found[name].float(), weight.detach().float())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.999])
def test_a_stream_that_ends_early_is_an_error(share):
    whole = sent()
    with pytest.raises(ConnectionError, match="end early"):
        list(read_weights(io.BytesIO(whole[: int(share * len(whole))])))


class Worker(WeightReceiver):
    """With vLLM's method, which has no model between its first and its last weight."""

    def __init__(self):
        self.loaded = None

    def reload_weights(self, weights_iterator):
        self.loaded = {}
        self.loaded.update(weights_iterator)


def test_several_workers_read_at_once():
    workers = [Worker() for _ in range(3)]
    with offered(WEIGHTS.items, "127.0.0.1") as offer:
        threads = [threading.Thread(target=w.receive_weights, args=offer) for w in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert all(worker.loaded.keys() == WEIGHTS.keys() for worker in workers)
    with pytest.raises(OSError):  # no longer offered
        Worker().receive_weights(*offer)


@pytest.mark.parametrize("first", [b"", b"x" * 64, b"GET / HTTP/1.1\r\n\r\n" + b" " * 64])
def test_who_does_not_know_the_token_gets_nothing(first):
    with offered(WEIGHTS.items, "127.0.0.1") as offer:
        with socket.create_connection(offer[:2], 5) as stranger:
            stranger.sendall(first)
            stranger.shutdown(socket.SHUT_WR)
            assert received(stranger) == b""
        worker = Worker()
        with pytest.raises(ConnectionError):  # and has the weights that it had
            worker.receive_weights(offer.host, offer.port, "0" * 64)
        assert worker.loaded is None


def received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1)
    except ConnectionResetError:  # it left bytes unread
        return b""


def test_a_reader_that_hangs_up_ends_nothing_else():
    large = {"large": torch.zeros(1 << 22)}
    with offered(large.items, "127.0.0.1") as offer:
        with socket.create_connection(offer[:2], 5) as leaves:
            leaves.sendall(offer.token.encode())
            assert leaves.recv(8)
        worker = Worker()
        worker.receive_weights(*offer)
    assert worker.loaded["large"].numel() == 1 << 22


def test_a_fault_of_ours_is_shown_and_a_hang_up_is_not(capsys):
    def breaks():
        yield "first", torch.ones(1)
        raise RuntimeError("out of memory")

    worker = Worker()
    with offered(breaks, "127.0.0.1") as offer, pytest.raises(ConnectionError, match="end early"):
        worker.receive_weights(*offer)
    assert "RuntimeError: out of memory" in wait_for(capsys)
    large = {"large": torch.zeros(1 << 24)}
    with offered(large.items, "127.0.0.1") as offer:
        with socket.create_connection(offer[:2], 5) as leaves:
            leaves.sendall(offer.token.encode())
            assert leaves.recv(8)
        Worker().receive_weights(*offer)
    assert "Error" not in capsys.readouterr().err


def wait_for(capsys) -> str:
    """What is written to stderr, within some seconds: another thread writes it."""
    said, until = "", time.monotonic() + 10
    while "RuntimeError" not in said and time.monotonic() < until:
        time.sleep(0.02)
        said += capsys.readouterr().err
    return said


def test_the_servers_side_needs_nothing_of_ours():
    """vLLM's own environment may lack what opsd needs."""
    code = "import sys, opsd.common.weight_stream as m; m.WeightReceiver; "
    code += "print(*(n for n in sys.modules if n.startswith('opsd')))"
    said = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=120)
    assert said.split() == ["opsd", "opsd.common", "opsd.common.weight_stream"]


# With a server.


@pytest.fixture
def fake(files):
    server = FakeVLLM(files[0])
    server.receives = True
    yield server
    server.stop()


def sampler(fake, student, directory) -> ServerSampler:
    server = VLLMServer(fake.address, timeout=5.0, patience=0.4)
    stops, place = stop_ids(*student), directory / "weights"
    return ServerSampler(server, stops, place, torch.float32, streams=True)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_server_loads_what_the_model_has(on_cpu, fake, student, contexts, tmp_path):
    fake.on_cpu = on_cpu
    engine = sampler(fake, student, tmp_path)
    assert engine.sample(contexts[:1], Sampling(4)) and fake._first
    engine.sync_weights(student[0])
    assert not fake._first  # what the old weights made of the contexts
    expected = dict(named_weights(student[0], torch.float32, head_too=on_cpu))
    assert fake.reloads[0].keys() == expected.keys()
    assert all(torch.equal(w, expected[name]) for name, w in fake.reloads[0].items())
    assert engine.sync["sync_bytes"] == sum(w.nbytes for w in expected.values())
    assert engine.sample(contexts[:1], Sampling(4))
    assert [*tmp_path.iterdir()] == []


def test_a_server_that_cannot_connect_back_is_an_error_at_once(
    fake, student, tmp_path, monkeypatch
):
    with offered(WEIGHTS.items, "127.0.0.1") as over:
        pass
    monkeypatch.setattr("opsd.rollout.vllm_client.offered", lambda *_: nullcontext(over))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"Connection refused.*check that it can connect.*both see"):
        sampler(fake, student, tmp_path).sync_weights(student[0])
    assert time.monotonic() - start < 5 and fake.reloads == []


def test_a_run(fake, files, tmp_path):
    """Its weights go over TCP, unless a directory is named."""
    run = tmp_path / "run"
    rollout = {"engine": "vllm_server", "server": fake.address}
    train(short_config(*files, run, rollout=rollout), quiet())
    lines = read_lines(run / "metrics.jsonl")
    assert all(abs(line["engine_divergence"]) < 1e-4 for line in lines)
    sent = [b["method"] for route, b in fake.requests if route == "/collective_rpc"]
    assert "receive_weights" in sent and "reload_weights" not in sent
    fake.requests.clear()
    named = rollout | {"weights_dir": str(tmp_path / "both")}
    train(short_config(*files, tmp_path / "other", rollout=named), quiet())
    sent = [b["method"] for route, b in fake.requests if route == "/collective_rpc"]
    assert "reload_weights" in sent and "receive_weights" not in sent


def test_an_evaluation_sends_a_local_model(fake, files, tmp_path):
    """The server need not see its directory."""
    arguments = ["eval", str(files[0]), "--benchmark", str(files[1]), "--problems", "2"]
    arguments += ["--max-new-tokens", "4", "--prompt", "Q:{{ problem }}", "--output"]
    by_server = ["--engine", "vllm_server", "--server", fake.address]
    assert main([*arguments, str(tmp_path / "eval"), *by_server]) == 0
    sent = [b["method"] for route, b in fake.requests if route == "/collective_rpc"]
    assert "receive_weights" in sent and "reload_weights" not in sent


def test_adapters_alone_go_by_a_directory(fake, files, tmp_path):
    fake.rank, fake.may_adapt = 8, True
    rollout = {"engine": "vllm_server", "server": fake.address}
    lora = {"lora": {"rank": 4, "alpha": 8}}
    train(short_config(*files, tmp_path / "run", rollout=rollout, model=lora), quiet())
    assert any(route == "/v1/load_lora_adapter" for route, _ in fake.requests)
    sent = [b["method"] for route, b in fake.requests if route == "/collective_rpc"]
    assert "receive_weights" not in sent
