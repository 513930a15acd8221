"""HTTP requests with a limit on the time and the size of the whole answer.

They use no proxies, since the server is the user's own, and follow no redirects, since a redirect
could send the server's key to another host.
"""

from __future__ import annotations

import io
import json
import os
import random
import socket
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Event
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from opsd.common.errors import UserError

PIECE = 1 << 16  # bytes per read
LONGEST_WAIT = 30.0  # seconds between two attempts
JITTER = random.Random()  # its own generator: a run saves and restores the global one

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a request is sent again."""

Said = TypeVar("Said")


class ServerError(UserError):
    """The server failed; the run should save its state and end."""


class ServerGoneError(ServerError):
    """The server has not answered within `patience`."""


class ServerAnswerError(ServerError):
    """The server refused, or its answer is invalid: asking again would not help."""


class NoAnswerError(Exception):
    """The server cannot be reached, is silent or breaks off: asking again may help."""


class TooLongError(Exception):
    """The answer has more bytes than a valid answer to this request can have."""


class Answer(NamedTuple):
    """A server's answer: its HTTP status, the target of a redirect, and its body."""

    status: int
    location: str | None
    content: bytes


def persist(
    attempt: Callable[[], Said], patience: float, server: str, stop: Event | None = None
) -> Said:
    """Call `attempt` again while it raises NoAnswerError, for at most `patience` seconds; return
    its result. Raises ServerGoneError, whose message begins with `server`.

    stop: once it is set, the next failure is final.
    """
    stop = stop or Event()
    failing_since, wait = None, min(1.0, patience / 8)
    while True:
        try:
            return attempt()
        except NoAnswerError as error:
            now = time.monotonic()
            failing_since = now if failing_since is None else failing_since
            if now - failing_since + wait > patience or stop.is_set():
                raise ServerGoneError(
                    f"{server}: {error}, for {now - failing_since:.0f} s now"
                ) from error
        # A random wait, so that not all requests arrive at once when the server is back.
        stop.wait(wait * JITTER.uniform(0.75, 1.25))
        wait = min(2 * wait, LONGEST_WAIT)


def check_redirect(route: str, found: Answer) -> None:
    """Raises ValueError for a redirect."""
    if 300 <= found.status < 400:
        raise ValueError(
            f"redirects {route} to {(found.location or '?')[:200]!r}: redirects are not "
            "followed, for they would take the key along; give the address itself"
        )


def said(content: bytes) -> str:
    """The message in a server's error answer, on one line of at most 300 characters."""
    text = content[:10_000].decode(errors="replace")
    try:
        answer = json.loads(text)
        inner = answer.get("error") or answer.get("detail") or answer
        text = inner.get("message", text) if isinstance(inner, dict) else inner
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(str(text).split())[:300]


def exchange(
    address: str, route: str, body: Any, timeout: float, longest: int, key: str = "VLLM_API_KEY"
) -> Answer:
    """Send a GET, or a POST of `body` as JSON; return the answer.

    timeout: seconds for the whole exchange, so that a server that sends slowly cannot hold up a
    run. longest: most bytes of the answer. key: the environment variable with the server's key.

    Raises NoAnswerError, TooLongError.
    """
    parts, until = urlsplit(address), time.monotonic() + timeout
    connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = connect(parts.hostname, parts.port, timeout=timeout)
    bounded: Any = partial(_Response, until=until, room=longest)
    connection.response_class = bounded
    data = None if body is None else json.dumps(body).encode()
    try:
        path = parts.path.rstrip("/") + route
        connection.request("GET" if data is None else "POST", path, data, _headers(key))
        response = connection.getresponse()
        pieces = list(iter(lambda: response.read(PIECE), b""))
        if response.length:
            raise NoAnswerError(f"{route} breaks off {response.length} bytes early")
        return Answer(response.status, response.getheader("Location"), b"".join(pieces))
    except TimeoutError as error:
        raise NoAnswerError(f"{route} has not answered within {timeout:.0f} s") from error
    except (OSError, HTTPException, ValueError) as error:  # refused, reset, no HTTP, cut short
        said = getattr(error, "verify_message", "") or str(error) or type(error).__name__
        raise NoAnswerError(f"{route} cannot be reached ({said[:200]})") from error
    finally:
        connection.close()


def own_address(address: str) -> str:
    """This machine's address on its way to the server. Raises NoAnswerError."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), LONGEST_WAIT) as connection:
            return connection.getsockname()[0]
    except OSError as error:
        raise NoAnswerError(f"it cannot be reached ({error})") from error


def key_in(variable: str) -> str | None:
    """Read a server's key from the environment. Raises UserError if no HTTP header may hold it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable} holds characters that no HTTP header may have")
    return key or None


def _headers(variable: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key := key_in(variable):
        headers["Authorization"] = f"Bearer {key}"
    return headers


class _Response(HTTPResponse):
    """A response that raises TimeoutError after `until`, and TooLongError beyond `room` bytes."""

    def __init__(self, sock, until: float, room: int, **how):
        super().__init__(sock, **how)
        self.fp = io.BufferedReader(_Bounded(sock, self.fp.detach(), until, room))


class _Bounded(io.RawIOBase):
    def __init__(self, sock, file: io.RawIOBase, until: float, room: int):
        self._sock, self._file, self._until, self._room = sock, file, until, room

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        count = self._file.readinto(buffer)
        self._room -= count or 0
        if self._room < 0:
            raise TooLongError
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
