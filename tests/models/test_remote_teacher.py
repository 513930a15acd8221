"""opsd serve-teacher: the losses of a teacher in this process, and none of what a stranger asks."""

import json
import math
import socket
import threading
import time
from urllib.request import Request, urlopen

import pytest
import torch
from helpers.hostile_server import HostileServer, response
from helpers.lines import read_lines
from helpers.training_cases import changed, load_student, quiet, short_config, timeless
from safetensors.torch import save

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.http import ServerGoneError
from opsd.config.sections import ModelSection
from opsd.models.load import load_model
from opsd.models.remote import KEY, RemoteTeacher
from opsd.models.teacher import make_members
from opsd.prefix import state_server
from opsd.prefix.state_server import StateServer
from opsd.training.run import train

MIX = [{}, {"context": "student", "policy": "model", "coefficient": 0.5}]


@pytest.fixture(scope="module")
def other(files, tmp_path_factory):
    """Another model of the student's tokenizer, saved."""
    directory = tmp_path_factory.mktemp("other")
    changed(files, 3).save_pretrained(directory)
    load_student(files)[1].save_pretrained(directory)
    return directory


class Serving:
    """A server in a thread, which can be killed and started again."""

    def __init__(self, directory, key=None, port=0, **more):
        model, tokenizer = load_model(ModelSection(path=str(directory)))
        self.http = StateServer(("127.0.0.1", port), model, tokenizer, key, **more)
        self.port = self.http.server_port
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serving(other):
    server = Serving(other)
    yield server
    server.stop()


def run_with(files, path, output, mix=None, **sections):
    teacher = {"path": str(path), "policy": "initial" if mix else "model", "mix": mix or []}
    if mix:
        teacher = {"mix": [mix[0], {**mix[1], "path": str(path)}]}
    teacher |= sections.pop("teacher", {})
    return short_config(*files, output, teacher=teacher, **sections)


@pytest.mark.parametrize(
    "sections",
    [{}, {"mix": MIX}, {"method": "grpo", "loss": {"kl": 0.1}, "rollout": {"group_size": 2}}],
)
def test_the_losses_are_those_of_a_teacher_in_this_process(
    sections, files, other, serving, tmp_path
):
    found = []
    for name, path in (("here", other), ("there", serving.address)):
        config = run_with(files, path, tmp_path / name, **sections)
        train(config, quiet())
        found.append(timeless(read_lines(tmp_path / name / "metrics.jsonl")))
    assert len(found[0]) == 4
    for here, there in zip(*found, strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            number = type(value) in (int, float)
            wanted = pytest.approx(value, rel=2e-4, abs=1e-6) if number else value
            assert there[name] == wanted, name
    assert read_lines(tmp_path / "there" / "samples.jsonl")[0]["tokens"]


def test_one_of_several_teachers_is_in_another_process(files, other, serving, tmp_path):
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    named = [{**line, "teacher": "ab"[n % 2]} for n, line in enumerate(lines)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    found = []
    for name, path in (("here", str(other)), ("there", serving.address)):
        teacher = {"routes": {"a": {"policy": "initial"}, "b": {"path": path}}}
        config = short_config(files[0], tmp_path / "rows.jsonl", tmp_path / name, teacher=teacher)
        found.append(read_lines(train(config, quiet()) / "metrics.jsonl"))
    measured = ("loss", "divergence", "teacher_b_divergence", "teacher_b_tokens")
    assert any("teacher_b_tokens" in line for line in found[0])
    for here, there in zip(*found, strict=True):
        for name in measured:
            wanted = pytest.approx(here.get(name, 0.0), rel=2e-4, abs=1e-6)
            assert there.get(name, 0.0) == wanted, name


def test_one_of_several_teachers_has_another_vocabulary(files, serving, tmp_path):
    config = short_config(*files, tmp_path / "run", teacher={"routes": {"b": {"path": "x"}}})
    config.teacher.routes["b"].path = serving.address
    model, tokenizer = load_student(files)
    tokenizer.add_tokens(["another"])
    arguments = config.teacher, config.model, torch.float32, model, tokenizer, model
    with pytest.raises(UserError, match="has another vocabulary than"):
        make_members(*arguments)


def killed_at(serving, number, monkeypatch):
    """The server dies while it answers that request, with the connection open; returns an event
    that is set when it is gone."""
    real, seen, gone = state_server._Handler._answer, [], threading.Event()

    def stop():
        serving.stop()
        gone.set()

    def dies(handler, status, content):
        posted = handler.command == "POST"
        seen.extend([1] if posted else [])
        if posted and len(seen) == number:
            threading.Thread(target=stop).start()
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        real(handler, status, content)

    monkeypatch.setattr(state_server._Handler, "_answer", dies)
    return gone


def test_a_server_that_is_killed_in_mid_step_and_comes_back(
    files, other, serving, tmp_path, monkeypatch
):
    train(run_with(files, serving.address, tmp_path / "whole"), quiet())
    gone, back = killed_at(serving, 6, monkeypatch), []

    def come_back():
        assert gone.wait(60)
        time.sleep(0.5)
        back.append(Serving(other, port=serving.port))

    again = threading.Thread(target=come_back)
    again.start()
    train(run_with(files, serving.address, tmp_path / "run"), quiet())
    again.join()
    back[0].stop()
    lines = [timeless(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("run", "whole")]
    assert lines[0] == lines[1]


def test_a_server_that_stays_away_stops_the_run_with_a_checkpoint(
    files, other, serving, tmp_path, monkeypatch
):
    train(run_with(files, serving.address, tmp_path / "whole"), quiet())
    gone = killed_at(serving, 7, monkeypatch)
    config = run_with(
        files,
        serving.address,
        tmp_path / "run",
        teacher={"server_patience": 1},
        train={"save_every": 0},
    )
    with pytest.raises(ServerGoneError, match=r"step \d is saved in .*--resume"):
        train(config, quiet())
    assert list((tmp_path / "run").glob("checkpoint-*"))
    assert gone.wait(60)
    back = Serving(other, port=serving.port)
    train(config, quiet(), resume=True)
    back.stop()
    lines = [timeless(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("run", "whole")]
    assert lines[0] == lines[1]


def asked(serving, route, body=None, key=None, headers=()):
    """(status, content) of one request."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = Request(serving.address + route, data, dict(headers))
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urlopen(request, timeout=20) as reply:
            return reply.status, reply.read()
    except OSError as error:
        return getattr(error, "code", None), getattr(error, "read", lambda: b"")()


def test_what_a_stranger_asks(serving):
    about = serving.http.about
    good = {"weights": about.weights, "roles": [[[[1, 2], [[3, 4]]]]]}
    assert asked(serving, "/states", good)[0] == 200
    for status, body in [
        (400, b"nonsense"),
        (400, b"[" * 60_000),
        (400, {**good, "more": 1}),
        (400, {**good, "roles": [[[[1, 2], []]]]}),
        (400, {**good, "roles": [[[[], [[3]]]]]}),
        (400, {**good, "roles": [[[[1, 2], [[3.5]]]]]}),
        (400, {**good, "roles": [[[[True], [[3]]]]]}),
        (400, {**good, "roles": [[[[1, -2], [[3]]]]]}),
        (400, {**good, "roles": [[[[1, 2], [[10**30]]]]]}),
        (400, {**good, "roles": [[[[1, 2], [[999_999]]]]]}),  # no embedding
        (400, {**good, "roles": [[[[1] * 300, [[2]]]]]}),  # no position
        (413, {**good, "roles": []}),
        (413, {**good, "roles": [[[[1], [[2]] * 140_000]]]}),
        (409, {**good, "weights": "0" * 64}),
    ]:
        found, said = asked(serving, "/states", body)
        assert found == status and len(json.loads(said)["error"]) <= 300, body
    assert asked(serving, "/states", good, headers=[("Content-Length", "9" * 11)])[0] == 413
    assert asked(serving, "/../etc/passwd")[0] == asked(serving, "/", good)[0] == 404
    elsewhere = [("Host", "a-page.example")]  # whose name has come to lead here
    assert asked(serving, "/states", good, headers=elsewhere)[0] == 401
    assert asked(serving, "/states", good)[0] == 200  # it still answers


def test_a_line_that_is_full_says_so(serving):
    good = {"weights": serving.http.about.weights, "roles": [[[[1, 2], [[3, 4]]]]]}
    found: list[int] = []
    ask = threading.Thread(target=lambda: found.append(asked(serving, "/states", good)[0]))
    with serving.http.turn:
        ask.start()
        while serving.http.line._value == state_server.WAITING:
            time.sleep(0.01)
        for _ in range(state_server.WAITING - 1):
            assert serving.http.line.acquire(blocking=False)
        assert asked(serving, "/states", good)[0] == 503
    ask.join()
    assert found == [200]


def wait_until(is_so):
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_client_that_dawdles_is_left(serving, monkeypatch):
    """Neither by a request that drips nor by many that say nothing."""
    monkeypatch.setattr(state_server, "SECONDS", 1.0)
    place = ("127.0.0.1", serving.port)
    with socket.create_connection(place, timeout=20) as slow:
        slow.sendall(b"GET /teacher HTTP/1.0\r\n")
        begun = time.monotonic()
        while time.monotonic() - begun < 15:
            try:
                slow.sendall(b"A: b\r\n")
            except OSError:
                break
            time.sleep(0.1)
        assert time.monotonic() - begun < 10
    monkeypatch.setattr(state_server, "SECONDS", 60.0)
    many = [socket.create_connection(place, timeout=20) for _ in range(state_server.CONNECTIONS)]
    wait_until(lambda: not serving.http.room._value)
    with socket.create_connection(place, timeout=20) as one_more:
        assert one_more.recv(1) == b""  # closed at once
    for one in many:
        one.close()
    wait_until(lambda: serving.http.room._value == state_server.CONNECTIONS)
    assert asked(serving, "/teacher")[0] == 200


def test_other_hosts_need_a_key(files, capsys, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr(StateServer, "serve_forever", lambda _: pytest.fail("it serves"))
    assert main(["serve-teacher", str(files[0]), "--host", "0.0.0.0", "--port", "0"]) == 1
    assert "--host is '0.0.0.0'" in capsys.readouterr().err


def test_a_port_that_is_taken(files, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve-teacher", str(files[0]), "--port", port]) == 1
    assert f"--port is {port}: Address already in use; name" in capsys.readouterr().err


def test_the_key_is_asked_for(other, files, monkeypatch):
    server, tokenizer = Serving(other, key="secret"), load_student(files)[1]
    what = 5.0, tokenizer, torch.device("cpu"), torch.float32
    try:
        assert asked(server, "/teacher")[0] == asked(server, "/teacher", key="wrong")[0] == 401
        with pytest.raises(UserError, match="401: the key is wrong or missing"):
            RemoteTeacher(server.address, *what)
        monkeypatch.setenv(KEY, "secret")
        assert RemoteTeacher(server.address, *what).about.width == 64
    finally:
        server.stop()


def test_what_a_hostile_server_answers(files):
    tokenizer, server = load_student(files)[1], HostileServer()
    from opsd.models.remote import vocabulary_digest

    about = {
        "weights": "a" * 64,
        "vocabulary": vocabulary_digest(tokenizer),
        "width": 4,
        "entries": 8,
        "bias": False,
        "dtype": "float32",
        "how": {"logit_scale": 1.0, "logit_softcap": None},
    }
    head = response(save({"weight": torch.zeros(8, 4)}))

    def teacher():
        return RemoteTeacher(server.address, 0.3, tokenizer, torch.device("cpu"), torch.float32)

    def states(reply):
        server.replies |= {"/teacher": response(about), "/head": head, "/states": reply}
        return teacher().states([[([1, 2], [[3, 4]])]])

    assert states(response(save({"0": torch.ones(2, 4)})))[0].shape == (2, 4)
    for reply, said in [
        (response(b""), "no tensors"),
        (response(b"\x08" + b"\0" * 7 + b"{" * 8), "no tensors"),
        (response(save({"0": torch.ones(3, 4)})), "other names or shapes"),
        (response(save({"1": torch.ones(2, 4)})), "other names or shapes"),
        (response(save({"0": torch.ones(2, 4, dtype=torch.int32)})), "another kind"),
        (response(save({"0": torch.full((2, 4), math.nan)})), "not finite"),
        (response(save({"0": torch.full((2, 4), 1e39, dtype=torch.float64)})), "another kind"),
        (response(save({"0": torch.ones(2, 4).to(torch.float8_e4m3fn)})), "another kind"),
        (response(b"\0" * 200_000), "with more than"),
        (response(b"", "302 Found", ["Location: http://elsewhere/"]), "redirects /states"),
        (response(b"", "500 Broken"), "answers 500"),
        (response(b"", "418 Teapot"), "answers 418"),
    ]:
        with pytest.raises(UserError, match=f"teacher.path is 'http://127.0.0.1.*{said}"):
            states(reply)
    for wrong, said in [
        ({**about, "width": 1 << 20}, "width is 1048576"),
        ({**about, "entries": 1 << 20}, "a head of 1,048,576 rows"),  # of gigabytes
        ({**about, "weights": "x"}, "weights is 'x'"),
        ({**about, "vocabulary": "b" * 64}, "another vocabulary"),
        ({**about, "dtype": "int8"}, "dtype is 'int8'"),
        ({**about, "how": {"logit_scale": "1"}}, "logit_scale is '1'"),
        ([], "answers /teacher with"),
    ]:
        server.replies["/teacher"] = response(wrong)
        with pytest.raises(UserError, match=f"teacher.path is 'http://127.0.0.1.*{said}"):
            teacher()
    server.stop()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"rollout": {"source": "teacher"}},
            "rollout.source is 'teacher': a teacher at an address",
        ),
        ({"eval": {"teacher": True}}, "eval.teacher is true: a teacher at an address"),
        ({"teacher": {"quantize": "int8"}}, "teacher.quantize is 'int8': teacher.path is an addr"),
        ({"teacher": {"path": "http://me:pw@host"}}, "OPSD_TEACHER_KEY"),
        ({"teacher": {"path": "m", "server_patience": 5}}, "no teacher is at an address"),
    ],
)
def test_what_goes_with_an_address(sections, said, files, tmp_path):
    with pytest.raises(UserError, match=said):
        run_with(files, "http://127.0.0.1:9", tmp_path, **sections)
