"""What a server may answer instead of a completion, its models, its settings: refused in one line,
within the time and the memory that were asked for."""

import gzip
import itertools
import json
import math
import resource
import time
from collections.abc import Callable, Iterable

import pytest
from helpers.hostile_server import HostileServer, response
from helpers.mutations import as_json
from helpers.run_attacks import mutated

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.rollout import Sampling
from opsd.rollout.server import Request
from opsd.rollout.sglang_client import SGLangServer
from opsd.rollout.vllm_client import VLLMServer

CONTEXT, STOPS, VOCABULARY = [1, 2, 3], frozenset({9}), 27
SAMPLING = Sampling(4)
REQUEST = Request(CONTEXT, SAMPLING, 0, STOPS, VOCABULARY)
TIMEOUT, PATIENCE = 1.0, 0.2
CHOICE = {
    "index": 0,
    "text": "ab",
    "logprobs": {"token_logprobs": [-0.5, -1.0, 0.0, -9999.0], "tokens": list("abcd")},
    "finish_reason": "length",
    "stop_reason": None,
    "token_ids": [4, 5, 6, 7],
    "prompt_token_ids": CONTEXT,
}
GOOD = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "tiny",
    "choices": [CHOICE],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
}
MODELS = {"object": "list", "data": [{"id": "tiny", "root": "/m", "max_model_len": 128}]}


@pytest.fixture
def hostile(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = HostileServer()
    server.replies["/v1/models"] = response(MODELS)
    server.replies["/server_info"] = response(b"", "404 Not Found")
    yield server
    server.stop()


def changed(**changes) -> bytes:
    return response({**GOOD, "choices": [{**CHOICE, **changes}]})


def log_probs(*values) -> bytes:
    return changed(logprobs={"token_logprobs": list(values)})


def raw(old: str, new: str) -> bytes:
    """The good answer, a part of its text replaced."""
    text = json.dumps(GOOD)
    assert old in text
    return response(text.replace(old, new))


def drip(piece: bytes, seconds: float = 0.05):
    """The piece again and again, slowly: no single read waits long."""
    return lambda: (time.sleep(seconds) or piece for _ in range(2000))


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
DEEP = b"[" * 100_000
BOMB = gzip.compress(b" " * 50_000_000)


def then(first: bytes, more: Callable[[], Iterable[bytes]]):
    """A reply: the first piece, then all that `more()` makes."""
    return lambda head: itertools.chain([first], more())


def forever(piece: bytes):
    """The piece without an end, as fast as it is read."""
    return lambda: itertools.repeat(piece)


pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

COMPLETIONS = {
    "no JSON": response("tokens"),
    "JSON cut off": response(json.dumps(GOOD)[:-9]),
    "nothing": response(b""),
    "null": response("null"),
    "a number": response("1"),
    "a list": response([GOOD]),
    "a page of a proxy": response("<html><h1>Sign in</h1></html>"),
    "nested lists": response(DEEP + b"]" * 100_000),
    "nested lists without an end": response(DEEP),
    "nested objects": response(b'{"choices":' * 100_000),
    "nests in a choice": raw('"stop_reason": null', '"stop_reason": ' + "[" * 100_000),
    "not UTF-8": response(b'{"model": "\xff\xfe"}'),
    "UTF-16": response(json.dumps(GOOD).encode("utf-16")),
    "gzip": response(BOMB, headers=["Content-Encoding: gzip"]),
    "gzip unasked": response(gzip.compress(json.dumps(GOOD).encode())),
    "no choices": response({"model": "tiny"}),
    "an empty list of choices": response({**GOOD, "choices": []}),
    "two choices": response({**GOOD, "choices": [CHOICE, {**CHOICE, "index": 1}]}),
    "ten thousand choices": response({**GOOD, "choices": [CHOICE] * 10_000}),
    "a choice that is null": response({**GOOD, "choices": [None]}),
    "choices in an object": response({**GOOD, "choices": {"0": CHOICE}}),
    "another index": changed(index=1),
    "another model": response({**GOOD, "model": "other"}),
    "no model": response({"choices": [CHOICE]}),
    "no token ids": changed(token_ids=None),
    "an empty list of ids": changed(token_ids=[], logprobs={"token_logprobs": []}),
    "ids as text": changed(token_ids=["4", "5", "6", "7"]),
    "ids as one text": changed(token_ids="4567"),
    "ids as floats": changed(token_ids=[4.5, 5, 6, 7]),
    "ids as whole floats": raw("[4, 5, 6, 7]", "[4.0, 5, 6, 7]"),
    "ids as booleans": changed(token_ids=[True, 5, 6, 7]),
    "a negative id": changed(token_ids=[-1, 5, 6, 7]),
    "an id beyond the vocabulary": changed(token_ids=[4, 5, 6, VOCABULARY]),
    "an id beyond 64 bits": changed(token_ids=[4, 5, 6, 10**30]),
    "an id that is null": changed(token_ids=[4, 5, 6, None]),
    "lists of ids": changed(token_ids=[[4, 5, 6, 7]]),
    "more tokens than asked": changed(token_ids=[4] * 5, logprobs={"token_logprobs": [-1.0] * 5}),
    "a million tokens": changed(
        token_ids=[4] * 1_000_000, logprobs={"token_logprobs": [-1.0] * 1_000_000}
    ),
    "cut before the length asked": changed(
        token_ids=[4, 5], logprobs={"token_logprobs": [-1.0] * 2}
    ),
    "stopped without a stop": changed(finish_reason="stop"),
    "not stopped at a stop": changed(token_ids=[4, 5, 6, 9]),
    "a stop in the middle": changed(token_ids=[4, 9, 6, 7]),
    "an unknown reason": changed(finish_reason="content_filter"),
    "no reason": changed(finish_reason=None),
    "a reason that is a number": changed(finish_reason=1),
    "an abort that never ends": changed(finish_reason="abort"),
    "another context": changed(prompt_token_ids=[1, 2, 4]),
    "no log-probabilities": changed(logprobs=None),
    "too few log-probabilities": log_probs(-1.0, -1.0, -1.0),
    "too many log-probabilities": log_probs(*[-1.0] * 5),
    "a log-probability that is null": log_probs(-1.0, -1.0, -1.0, None),
    "NaN": log_probs(-1.0, -1.0, -1.0, math.nan),
    "infinity": log_probs(-1.0, -1.0, -1.0, math.inf),
    "minus infinity": log_probs(-1.0, -1.0, -1.0, -math.inf),
    "an overflow": raw("-9999.0", "-1e999"),
    "a probability above 1": log_probs(-1.0, -1.0, -1.0, 0.7),
    "a log-probability as text": log_probs(-1.0, -1.0, -1.0, "-1"),
    "a log-probability as a boolean": log_probs(-1.0, -1.0, -1.0, False),
    "a log-probability of -1e300": log_probs(-1.0, -1.0, -1.0, -1e300),
    "a longer body than its length": response(json.dumps(GOOD), headers=["Content-Length: 40"]),
    "a shorter body than its length": response(json.dumps(GOOD), headers=["Content-Length: 9999"]),
    "a length of 10**18": response(json.dumps(GOOD), headers=[f"Content-Length: {10**18}"]),
    "600 MB": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 600000000\r\n\r\n",
        *itertools.repeat(b" " * 1_000_000, 600),
    ),
    "chunks without an end": then(CHUNKED, forever(chunk(b" " * 100_000))),
    "a chunk of 2**200 bytes": CHUNKED + b"%x\r\n" % 2**200,
    "a chunk of -1 bytes": CHUNKED + b"-1\r\nabc",
    "a chunk of no number": CHUNKED + b"zz\r\nabc",
    "trailers without an end": then(CHUNKED + b"0\r\n", forever(b"A: b\r\n")),
    "a dripping body": then(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", drip(b" ")),
    "dripping headers": then(b"HTTP/1.1 200 OK\r\nA: ", drip(b"a")),
    "a dripping status": then(b"HTTP/1.1 ", drip(b"2")),
    "continue without an end": then(b"", forever(b"HTTP/1.1 100 Continue\r\n\r\n")),
    "a header without an end": then(b"HTTP/1.1 200 OK\r\nA: ", forever(b"a" * 1000)),
    "a thousand headers": response(json.dumps(GOOD), headers=["A: b"] * 1000),
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "HTTP of a strange status": response(json.dumps(GOOD), "999 Strange"),
    "a status of no number": response(json.dumps(GOOD), "20x OK"),
    "no content": response(b"", "204 No Content"),
    "nothing at all": b"",
    "500 with a long body": response(b"x" * 5_000_000, "500 Internal Server Error"),
    "500 with nested JSON": response(DEEP, "500 Internal Server Error"),
    "500 that drips": then(b"HTTP/1.1 500 No\r\nContent-Length: 999\r\n\r\n", drip(b" ")),
    "400 with escapes": response({"error": {"message": "\x1b[2J\n\x00"}}, "400 Bad Request"),
    "400 with a list": response({"error": {"message": [1, {"a": 2}]}}, "400 Bad Request"),
    "401": response({"error": "Unauthorized"}, "401 Unauthorized"),
    "a redirect without a place": response(b"", "302 Found"),
    "a redirect to a file": response(b"", "302 Found", ["Location: file:///etc/passwd"]),
}


def ask(hostile) -> object:
    """A completion of the hostile server."""
    server = VLLMServer(hostile.address, timeout=TIMEOUT, patience=PATIENCE)
    return server.complete(REQUEST)


def refused(work) -> str:
    """What the one line says with which `work` fails, soon and without much memory."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        work()
    assert time.process_time() - begun < 5 and time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert len(str(caught.value)) < 1000 and "secret" not in str(caught.value)
    return str(caught.value)


def test_a_good_answer_is_taken(hostile):
    hostile.replies["/v1/completions"] = response(GOOD)
    rollout = ask(hostile)
    assert (rollout.ids, rollout.finished) == ([4, 5, 6, 7], False)
    assert rollout.sampling_log_probs == [-0.5, -1.0, 0.0, -9999.0]
    assert "Authorization: Bearer secret" in hostile.seen[-1]
    hostile.replies["/v1/completions"] = changed(
        token_ids=[4, 9], logprobs={"token_logprobs": [-1.0, 1e-7]}, finish_reason="stop"
    )
    rollout = ask(hostile)
    assert rollout.finished and rollout.sampling_log_probs == [-1.0, 0.0]


@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_hostile_completion_is_one_line(name, hostile):
    hostile.replies["/v1/completions"] = COMPLETIONS[name]
    assert refused(lambda: ask(hostile)).startswith("rollout.server is 'http://127.0.0.1:")


SETTINGS = {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}, "instance_id": "a"}}
OTHERS = [
    ("/v1/models", "<html>"),
    ("/v1/models", {"data": []}),
    ("/v1/models", {"data": "tiny"}),
    ("/v1/models", {"data": [{}]}),
    ("/v1/models", {"data": [{"id": 7}]}),
    ("/v1/models", {"data": [{"id": ""}]}),
    ("/v1/models", {"data": [{"id": "tiny", "root": ["/m"]}]}),
    ("/v1/models", {"data": [{"id": "a" * 1_000_000}]}),
    ("/server_info", []),
    ("/server_info", {"vllm_config": "VllmConfig(...)"}),
    ("/server_info", {"vllm_config": {"model_config": {"logprobs_mode": 1}}}),
    ("/server_info", {"vllm_config": {"instance_id": {}}}),
    ("/collective_rpc", "<html>"),
    ("/collective_rpc", {"error": "no"}),
    ("/reset_prefix_cache", {"success": "no"}),
    ("/reset_prefix_cache", {"success": False}),
    ("/reset_prefix_cache", "<html>"),
]


@pytest.mark.parametrize("case", range(len(OTHERS)))
def test_a_hostile_answer_about_the_server_is_one_line(case, hostile):
    good = {"/server_info": SETTINGS, "/collective_rpc": {"results": [None]}}
    good["/reset_prefix_cache"] = {"success": True}
    hostile.replies |= {route: response(answer) for route, answer in good.items()}
    load = lambda: VLLMServer(hostile.address, timeout=1, patience=0.2).load("/w")  # noqa: E731
    load()
    route, answer = OTHERS[case]
    hostile.replies[route] = response(answer)
    refused(load)


def test_an_answer_longer_than_any_is_not_read_to_its_end(hostile):
    """Blanks are valid JSON, and the server sends them fast enough."""
    hostile.replies["/v1/models"] = response(json.dumps(MODELS) + " " * 17_000_000)
    said = refused(lambda: VLLMServer(hostile.address, timeout=9, patience=0.2))
    assert "with more than 16,000,000 bytes" in said


def test_releases_that_answer_nothing_are_understood(hostile):
    """vLLM's /collective_rpc and /reset_prefix_cache have had answers without content."""
    hostile.replies |= {"/server_info": response(SETTINGS)}
    hostile.replies |= dict.fromkeys(("/collective_rpc", "/reset_prefix_cache"), response(b""))
    VLLMServer(hostile.address, timeout=1, patience=0.2).load("/w")


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 T", "308 P"])
def test_no_redirect_is_followed(status, hostile):
    """Neither to another host nor to this one: the key goes where the user has sent it."""
    other = HostileServer()
    for to in (other, hostile):
        place = f"Location: {to.address}/elsewhere"
        hostile.replies |= {"/v1/models": response(b"", status, [place])}
        said = refused(lambda: VLLMServer(hostile.address, timeout=1, patience=0.2))
        assert "redirects /v1/models to" in said and to.address in said
    assert other.seen == [] and len(hostile.seen) == 2
    other.stop()


def taken_rightly(answer: dict, rollout) -> bool:
    """Whether the rollout is what the answer says, and the answer is one to what was asked."""
    (choice,) = answer["choices"]
    ids, probabilities = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    stopped = ids[-1] in STOPS
    return (
        answer["model"] == "tiny"
        and choice["index"] == 0
        and rollout.ids == ids
        and all(type(i) is int and 0 <= i < VOCABULARY for i in ids)
        and len(ids) == len(probabilities)
        and all(type(p) in (int, float) and -1e6 <= p <= 0 for p in probabilities)
        and (len(ids) == SAMPLING.max_new_tokens or stopped)
        and choice["finish_reason"] == ("stop" if stopped else "length")
        and choice.get("prompt_token_ids") in (None, CONTEXT)
    )


HEADERS = [
    "Content-Type: text/plain; charset=utf-16", "Content-Type: application/json; charset=nobody",
    "Content-Encoding: br", "Content-Encoding: identity", "Transfer-Encoding: gzip",
    "Connection: x",
    "Content-Length: 1", "Content-Length: -1", "Content-Length: 9\r\nContent-Length: 99",
    "A" * 5000,
    "Content-Length: 1e3", "Location: http://127.0.0.1:1/", "Set-Cookie: a=b",
    "Retry-After: 10000000",
    "Content-Length: 0x10", "Transfer-Encoding: chunked", "Refresh: 0; url=file:///", "\xff: \xff",
    ":",
    "Content-Length:  \t", "Upgrade: websocket", "Content-Range: bytes 0-1/2",
    "Keep-Alive: timeout=-1",
]  # fmt: skip


def test_a_changed_answer_is_refused_or_means_the_same(draw, hostile):
    answer = mutated(GOOD, draw) if draw.random() < 0.8 else GOOD
    text = json.dumps(answer).encode()
    if draw.random() < 0.3:  # another text of it: a key twice, nests, numbers of no end
        text = as_json(draw, answer)
    elif draw.random() < 0.2:  # damage in the bytes as well
        place = draw.randrange(len(text))
        text = text[:place] + draw.randbytes(draw.randrange(4)) + text[place + 1 :]
    headers = draw.sample(HEADERS, draw.choice([0, 0, 0, 1, 2]))
    hostile.replies["/v1/completions"] = response(text, headers=headers)
    try:
        rollout = ask(hostile)
    except UserError as error:
        assert len(str(error)) < 1000
    else:
        assert taken_rightly(json.loads(text), rollout)


ADDRESSES = {
    "http://me:pw-9@h:8000": "VLLM_API_KEY",
    "http://pw-9@h:8000": "VLLM_API_KEY",
    "https://:pw-9@h/": "VLLM_API_KEY",
    "http://h:8000/#a": "must look like",
    "http://h:8000/a b": "a blank",
    "http://h:8000/a\r\nX: y": "a blank",
    "http://" + "a" * 70 + ":1": "no host's name",
    "http://a..b:1": "no host's name",
    "http://h:99999": "65535",
    "javascript:alert(1)": "must look like",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_without_a_password_or_none(address, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {source: d}\n")
    train = ["train", str(tmp_path / "c.yaml"), f"output.dir={tmp_path / 'run'}"]
    server = json.dumps(address)
    assert main([*train, "rollout.engine=vllm_server", f"rollout.server={server}"]) == 1
    said = capsys.readouterr().err
    assert ADDRESSES[address] in said and "pw-9" not in said and not (tmp_path / "run").exists()
    evaluate = ["eval", "m", "--benchmark", "b", "--engine", "vllm_server", "--server", address]
    assert main(evaluate) == 1
    said = capsys.readouterr().err
    assert ADDRESSES[address] in said and "pw-9" not in said


# SGLang's dialect: what is shared is tested above, here is what it reads.

TOKENS = [[-0.5, 4, None], [-1.0, 5, None], [0.0, 6, None], [-9999.0, 7, None]]
META = {
    "id": "1",
    "finish_reason": {"type": "length", "length": 4},
    "prompt_tokens": 3,
    "completion_tokens": 4,
    "weight_version": "default",
    "output_token_logprobs": TOKENS,
}
INFO = {"model_path": "/m", "model_type": "qwen3", "weight_version": "default"}


def generated(**changes) -> bytes:
    return response({"text": "", "output_ids": [4, 5, 6, 7], "meta_info": {**META, **changes}})


def tokens(*entries) -> bytes:
    return generated(output_token_logprobs=list(entries))


GENERATED = {
    "no JSON": response("tokens"),
    "a list": response([{"meta_info": META}]),
    "no meta_info": response({"text": "a"}),
    "an error with 200": response({"error": {"message": "no"}}),
    "no tokens": tokens(),
    "no log-probabilities": generated(output_token_logprobs=None),
    "a token without its id": tokens([-0.5]),
    "a token of four": tokens([-0.5, 4, None, None]),
    "a token that is a number": tokens(4),
    "ids as text": tokens([-0.5, "4", None]),
    "ids as booleans": tokens([-0.5, True, None]),
    "a negative id": tokens([-0.5, -1, None]),
    "an id beyond the vocabulary": tokens(*TOKENS[:3], [-1.0, VOCABULARY, None]),
    "a log-probability that is null": tokens([None, 4, None]),
    "a log-probability above 0": tokens([0.7, 4, None]),
    "a log-probability as text": tokens(["-1", 4, None]),
    "NaN": tokens([math.nan, 4, None]),
    "minus infinity": tokens([-math.inf, 4, None]),
    "more tokens than asked": tokens(*TOKENS, [-1.0, 4, None]),
    "fewer tokens than asked": tokens(*TOKENS[:2]),
    "a stop in the middle": tokens(TOKENS[0], [-1.0, 9, None], *TOKENS[2:]),
    "stopped without a stop": generated(finish_reason={"type": "stop", "matched": 7}),
    "not stopped at a stop": tokens(*TOKENS[:3], [-1.0, 9, None]),
    "an unknown reason": generated(finish_reason={"type": "tired"}),
    "a reason that is a text": generated(finish_reason="length"),
    "no reason": generated(finish_reason=None),
    "an abort that never ends": generated(finish_reason={"type": "abort", "message": "x" * 10**6}),
    "another context": generated(prompt_tokens=4),
    "a context of -1": generated(prompt_tokens=-1),
    "600 MB": COMPLETIONS["600 MB"],
    "a dripping body": COMPLETIONS["a dripping body"],
    "nested lists": COMPLETIONS["nested lists"],
    "a redirect": response(b"", "307 Temporary", ["Location: http://127.0.0.1:1/generate"]),
}


@pytest.fixture
def sglang(hostile, monkeypatch):
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    hostile.replies |= {
        "/health": response(b""),
        "/model_info": response(INFO),
        "/server_info": response({"version": "0.5.9", "enable_deterministic_inference": True}),
        "/update_weights_from_disk": response({"success": True, "message": ""}),
        "/flush_cache": response("Cache flushed.\n"),
    }
    return hostile


def sglang_server(sglang) -> SGLangServer:
    return SGLangServer(sglang.address, timeout=TIMEOUT, patience=PATIENCE)


def test_a_good_sglang_answer_is_taken(sglang):
    sglang.replies["/generate"] = generated()
    rollout = sglang_server(sglang).complete(REQUEST)
    assert (rollout.ids, rollout.finished) == ([4, 5, 6, 7], False)
    assert rollout.sampling_log_probs == [-0.5, -1.0, 0.0, -9999.0]
    assert "Authorization: Bearer secret" in sglang.seen[-1]


@pytest.mark.parametrize("name", GENERATED)
def test_a_hostile_sglang_answer_is_one_line(name, sglang):
    sglang.replies["/generate"] = GENERATED[name]
    server = sglang_server(sglang)
    said = refused(lambda: server.complete(REQUEST))
    assert said.startswith("rollout.server is 'http://127.0.0.1:")


@pytest.mark.parametrize(
    ("route", "answer"),
    [
        ("/model_info", "<html>"),
        ("/model_info", {}),
        ("/model_info", {**INFO, "model_path": 7}),
        ("/model_info", {**INFO, "weight_version": ["a"]}),
        ("/server_info", []),
        ("/server_info", {"enable_deterministic_inference": "yes"}),
        ("/server_info", {"version": "1" * 10_000}),
        ("/v1/models", {"data": "tiny"}),
        ("/update_weights_from_disk", "<html>"),
        ("/update_weights_from_disk", {"success": False, "message": "no"}),
        ("/update_weights_from_disk", {"success": 1}),
    ],
)
def test_a_hostile_answer_about_an_sglang_server_is_one_line(route, answer, sglang):
    sglang.replies[route] = response(answer)
    assert route in refused(lambda: sglang_server(sglang).load("/w"))


def test_an_sglang_server_that_names_other_weights_is_refused(sglang):
    said = refused(lambda: sglang_server(sglang).load("/w"))
    assert "says that its weights are 'default'" in said
