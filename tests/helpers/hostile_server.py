"""A server that answers each route with the bytes that a test gives it."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterable

Reply = bytes | Iterable[bytes] | Callable[[str], bytes | Iterable[bytes]]
"""All bytes of an answer, pieces that are sent one by one, or a function that returns either."""


def response(
    content: bytes | str | object, status: str = "200 OK", headers: Iterable[str] = ()
) -> bytes:
    """A complete HTTP response; content that is neither bytes nor text is sent as JSON."""
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    content = content.encode() if isinstance(content, str) else content
    given = "".join(f"{line}\r\n" for line in headers)
    length = "" if "ength" in given or "hunked" in given else f"Content-Length: {len(content)}\r\n"
    return f"HTTP/1.1 {status}\r\n{given}{length}\r\n".encode() + content


class HostileServer:
    """`replies`: route → Reply. `seen`: the head of each request."""

    def __init__(self):
        self.replies: dict[str, Reply] = {}
        self.seen: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as file:
            head = b"".join(iter(file.readline, b"\r\n")).decode()
            length = [line for line in head.splitlines() if line.lower().startswith("content-len")]
            file.read(int(length[0].split(":")[1]) if length else 0)
            self.seen.append(head)
            reply = self.replies[head.split()[1].partition("?")[0]]
            reply = reply(head) if callable(reply) else reply
            for piece in [reply] if isinstance(reply, bytes) else reply:
                connection.sendall(piece)
