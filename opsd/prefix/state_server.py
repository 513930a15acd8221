"""The server of `opsd serve-teacher`: token ids → hidden states. See `opsd.models.remote`.

Requests are not trusted: each needs the key (if there is one), has a bounded length and time, and
only ids that the model has. A request holds all contexts and rollouts of a micro-batch, which run
together. One request runs at a time; if WAITING requests run or wait, others get status 503.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any, cast

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.common.errors import problem_said
from opsd.common.schema import FirstErrors
from opsd.models.head import head, head_arguments
from opsd.models.remote import Description, Digest, vocabulary_digest
from opsd.prefix.hidden_states import states_by_role

HERE = ("127.0.0.1", "[::1]", "localhost")
WAITING = 8  # requests that run or wait
CONNECTIONS = 32
ROUTES = "there are /teacher, /head and /states"
SECONDS = 60.0  # in which a client must send its request
SLOWEST = 1e7  # bytes a second that a client must read

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Text = Annotated[list[Id], Field(min_length=1)]
Group = tuple[Text, Annotated[list[Text], Field(min_length=1)]]
Role = Annotated[list[Group], Field(min_length=1)]


class Asked(FirstErrors):
    """The body of a request for /head or /states."""

    model_config = ConfigDict(strict=True, extra="forbid")

    weights: Digest
    roles: Annotated[list[Role], Field(max_length=16)] = Field([])


class StateServer(ThreadingHTTPServer):
    """Serves `model` at (host, port) to clients with the key. most_tokens: of one request."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        key: str | None = None,
        most_tokens: int = 1 << 17,
    ):
        self.model, self.key, self.most_tokens = model.eval(), key, most_tokens
        weight, bias = head(model)
        its = {"weight": weight} | ({} if bias is None else {"bias": bias})
        self.head = _as_bytes(its, weight.dtype)  # the same for all requests
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.about = Description(
            weights=digest.hexdigest(),
            vocabulary=vocabulary_digest(tokenizer),
            width=weight.shape[1],
            entries=len(weight),
            bias=bias is not None,
            dtype=cast(Any, str(weight.dtype).removeprefix("torch.")),
            how=head_arguments(model),
        )
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.turn, self.line = threading.Lock(), threading.BoundedSemaphore(WAITING)
        self.room = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the connection; close it if there are too many."""
        if not self.room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""

    @property
    def longest_body(self) -> int:
        """The most bytes of a request: each token is a number and a comma."""
        return (1 << 16) + 16 * self.most_tokens

    @torch.no_grad()
    def states(self, asked: Asked) -> list[Tensor]:
        """Compute the states of each role."""
        with self.turn:
            return states_by_role(self.model, asked.roles)


def _as_bytes(tensors: dict[str, Tensor], dtype: torch.dtype) -> bytes:
    return to_bytes({name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()})


def _tokens(asked: Asked) -> int:
    groups = [group for role in asked.roles for group in role]
    return sum(len(prefix) + sum(map(len, rollouts)) for prefix, rollouts in groups)


class _Handler(BaseHTTPRequestHandler):
    server: StateServer
    timeout = SECONDS
    protocol_version = "HTTP/1.0"  # one request a connection
    server_version, sys_version = "opsd", ""

    def setup(self) -> None:
        """Start a timer that ends a slow request: a timeout of single reads would not."""
        super().setup()
        self.clock = threading.Timer(SECONDS, self._give_up)
        self.clock.daemon = True
        self.clock.start()

    def finish(self) -> None:
        """Stop the timer."""
        self.clock.cancel()
        super().finish()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        if self._is_let_in():
            if self.path != "/teacher":
                return self._refuse(404, ROUTES)
            self._answer(200, self.server.about.model_dump_json().encode())

    def do_POST(self) -> None:
        if not self._is_let_in():
            return
        if self.path not in ("/head", "/states"):
            return self._refuse(404, ROUTES)
        length, most = self.headers.get("Content-Length", ""), self.server.longest_body
        if not (length.isdecimal() and len(length) < 12 and int(length) <= most):
            return self._refuse(413, f"a request has a Content-Length of at most {most}")
        body = self.rfile.read(int(length))
        self.clock.cancel()
        try:
            asked = Asked.model_validate_json(body)
        except ValidationError as error:
            return self._refuse(400, problem_said(error.errors()[0]))
        if asked.weights != self.server.about.weights:
            return self._refuse(409, "these are other weights than the run began with")
        if self.path == "/head":
            return self._answer(200, self.server.head)
        if not 0 < _tokens(asked) <= self.server.most_tokens:
            most = self.server.most_tokens
            return self._refuse(413, f"a request has 1 to {most} tokens (--most-tokens)")
        if not self.server.line.acquire(blocking=False):
            return self._refuse(503, "others wait already; ask again")
        try:
            self._states(asked)
        finally:  # released after the answer, so that slow readers count too
            self.server.line.release()

    def _is_let_in(self) -> bool:
        key, host = self.server.key, re.sub(r":\d+$", "", self.headers.get("Host", ""))
        if key is None and host not in HERE:  # such as a web page whose host name resolves to here
            self._refuse(
                401, "without OPSD_TEACHER_KEY it answers only requests to http://localhost"
            )
            return False
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if key is None or hmac.compare_digest(given, key.encode()):
            return True
        self._refuse(401, "the key is wrong or missing (OPSD_TEACHER_KEY)")
        return False

    def _states(self, asked: Asked) -> None:
        try:
            states = self.server.states(asked)
            named = {str(n): tensor for n, tensor in enumerate(states)}
            made = _as_bytes(named, getattr(torch, self.server.about.dtype))
        except ValueError as error:  # an id without an embedding, a context that is too long
            return self._refuse(400, str(error))
        except Exception as error:  # such as running out of memory
            return self._refuse(500, f"{type(error).__name__}: {error}")
        self._answer(200, made)

    def _refuse(self, status: int, why: str) -> None:
        self._answer(status, json.dumps({"error": why[:300]}).encode())

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.connection.settimeout(SECONDS + len(content) / SLOWEST)
        self.wfile.write(content)
