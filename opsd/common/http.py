"""HTTP requests with a limit on the time and the size of the whole answer.

They use no proxies, since the server is the user's own, and follow no redirects, since a redirect
could send the server's key to another host.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Event
from typing import Any, TypeVar
from urllib.parse import urlsplit

from opsd.common.errors import UserError

PIECE = 1 << 16  # bytes per read
LONGEST_WAIT = 30.0  # seconds between two attempts
JITTER = random.Random()  # its own generator: a run saves and restores the global one

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a request is sent again."""

_FAILED: dict[str, float] = {}  # server → when it first failed, of which a line has said

Result = TypeVar("Result")


class ServerError(UserError):
    """The server failed; the run should save its state and end."""


class ServerGoneError(ServerError):
    """The server has not answered within `patience`."""


class ServerAnswerError(ServerError):
    """The server refused, or its answer is invalid: asking again would not help."""


class NoRouteError(ServerAnswerError):
    """The server does not know the route."""


class NoAnswerError(Exception):
    """The server cannot be reached, is silent or breaks off: asking again may help."""


class TooLongError(Exception):
    """The answer has more bytes than a valid answer to this request can have."""


class Server:
    """A server's client: each request is sent again after failures that may pass.

    field: the option with its `address`; key: the environment variable with its key; hint: advice
    where a route is missing; patience: seconds of failures before ServerGoneError is raised.
    """

    address: str
    patience: float
    field: str
    key: str
    hint: str

    def persist(self, attempt: Callable[[], Result], stop: Event | None = None) -> Result:
        """Call `attempt` again while it raises NoAnswerError; return its result. Of the first
        failure a line tells, since the wait is long. stop: once set, the next failure is final."""
        stop, where = stop or Event(), f"{self.field} is {self.address!r}"
        failing_since, wait = None, min(1.0, self.patience / 8)
        while True:
            try:
                return attempt()
            except NoAnswerError as error:
                now = time.monotonic()
                if _FAILED.setdefault(where, now) == now:
                    told = f"asked again for {self.patience:g} s: start it, or correct the address"
                    print(f"{where}: {error}; {told}", file=sys.stderr)
                failing_since = now if failing_since is None else failing_since
                if now - failing_since + wait > self.patience or stop.is_set():
                    told = f"{where}: {error}, for {now - failing_since:.0f} s now"
                    raise ServerGoneError(told) from error
            # A random wait, so that not all requests arrive at once when the server is back.
            stop.wait(wait * JITTER.uniform(0.75, 1.25))
            wait = min(2 * wait, LONGEST_WAIT)

    def fetch(self, route: str, body: Any, timeout: float, longest: int, passing=PASSING) -> bytes:
        """Send a GET, or a POST of `body` as JSON, once; return the answer.

        timeout: seconds for the whole exchange, so that a server that sends slowly cannot hold up a
        run. longest: most bytes of the answer. passing: statuses that raise NoAnswerError; others
        raise ServerAnswerError.
        """
        parts, until = urlsplit(self.address), time.monotonic() + timeout
        connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = connect(parts.hostname, parts.port, timeout=timeout)
        bounded: Any = partial(_Response, until=until, room=longest)
        connection.response_class = bounded
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := key_in(self.key):
            headers["Authorization"] = f"Bearer {key}"
        try:
            path = parts.path.rstrip("/") + route
            connection.request("GET" if data is None else "POST", path, data, headers)
            response = connection.getresponse()
            content = b"".join(iter(lambda: response.read(PIECE), b""))
        except TooLongError:
            raise self._error(f"answers {route} with more than {longest:,} bytes") from None
        except TimeoutError as error:
            raise NoAnswerError(f"{route} has not answered within {timeout:.0f} s") from error
        except (OSError, HTTPException, ValueError) as error:  # refused, reset, no HTTP, cut short
            told = getattr(error, "verify_message", "") or str(error) or type(error).__name__
            raise NoAnswerError(f"{route} cannot be reached ({told[:200]})") from error
        finally:
            connection.close()
        if response.length:
            raise NoAnswerError(f"{route} breaks off {response.length} bytes early")
        if response.status == 200:
            return content
        if 300 <= response.status < 400:
            raise self._error(
                f"redirects {route} to {response.getheader('Location', '?')[:200]!r}: this is not "
                "followed, for it would take the key along; give the address itself"
            )
        told = f"{route} answers {response.status}: {said(content)}".rstrip(": ")
        if response.status in passing:
            raise NoAnswerError(told)
        if response.status == 404:
            hint = "" if route.startswith("/v1/") else f" ({self.hint})"
            if content.lstrip().startswith(b"<"):  # a page, which no server of models has
                hint = "; another server is there: correct the address"
            raise NoRouteError(f"{self._error(told)}{hint}")
        raise self._error(told)

    def own_address(self) -> str:
        """This machine's address on its way to the server. Raises NoAnswerError."""
        parts = urlsplit(self.address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            with socket.create_connection((parts.hostname, port), LONGEST_WAIT) as connection:
                return connection.getsockname()[0]
        except OSError as error:
            raise NoAnswerError(f"it cannot be reached ({error})") from error

    def _error(self, what: str) -> ServerAnswerError:
        return ServerAnswerError(f"{self.field} is {self.address!r}: the server {what}")


def said(content: bytes) -> str:
    """The message in a server's error answer, on one line of at most 300 characters."""
    text = content[:10_000].decode(errors="replace")
    if text.lstrip().startswith("<"):  # a page, as of a proxy
        text = re.sub(r"<[^>]*>", " ", text)
    try:
        answer = json.loads(text)
        inner = answer.get("error") or answer.get("detail") or answer
        text = inner.get("message", text) if isinstance(inner, dict) else inner
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(str(text).split())[:300]


def key_in(variable: str) -> str | None:
    """Read a server's key from the environment. Raises UserError if no HTTP header may hold it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable} holds characters that no HTTP header may have")
    return key or None


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
