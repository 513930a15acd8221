"""One request over HTTP, whose whole answer is bounded in time and in size.

There are no proxies, since the server is the user's own, and no redirects, since a redirect could
take the server's key to another host.
"""

import io
import json
import os
import time
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from opsd.common.errors import UserError

PIECE = 1 << 16  # bytes that are read at once


class NoAnswerError(Exception):
    """The server is not there, or is silent, or breaks off: that may pass."""


class TooLongError(Exception):
    """The answer has more bytes than one to this question can have."""


class Answer(NamedTuple):
    """`location`: where a redirect points."""

    status: int
    location: str | None
    content: bytes


def exchange(address: str, route: str, body: Any, timeout: float, longest: int) -> Answer:
    """The answer to a GET, or with `body` to a POST of JSON.

    timeout: seconds for all of it, so that a server that drips cannot hold a run.
    longest: bytes of it.

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
        connection.request("GET" if data is None else "POST", path, data, _headers())
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


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY", "").strip():
        if not (key.isascii() and key.isprintable()):
            raise UserError("VLLM_API_KEY holds characters that no HTTP header may have")
        headers["Authorization"] = f"Bearer {key}"
    return headers


class _Response(HTTPResponse):
    """A response that is read up to a time, and up to a number of bytes."""

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
