"""Weights over TCP: a training process offers them, and the workers of a server read them.

Each tensor is the length of what follows (8 bytes, little-endian) and a safetensors file of this
tensor alone. Length 0 ends the stream. This module imports nothing of `opsd`, since vLLM imports it
where the server runs (`--worker-extension-cls opsd.common.weight_stream.WeightReceiver`).
"""

import hmac
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from itertools import chain
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

Weights = Iterable[tuple[str, Tensor]]
SILENT = 600.0  # seconds that one side waits for the other


class Offer(NamedTuple):
    """Where weights can be read: the arguments of `WeightReceiver.receive_weights`."""

    host: str
    port: int
    token: str  # 64 characters, which a reader sends first


@contextmanager
def offered(weights: Callable[[], Weights], host: str) -> Iterator[Offer]:
    """Send `weights()` on each connection to `host`, an address of this machine, that begins with
    the offer's token. A server has a worker a GPU, and each reads all weights."""
    token = secrets.token_hex(32)

    class Reader(StreamRequestHandler):
        timeout = SILENT

        def handle(self) -> None:
            if hmac.compare_digest(self.rfile.read(len(token)), token.encode()):
                write_weights(self.wfile, weights())

    class Listener(ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads, block_on_close = True, False

        def handle_error(self, *given: Any) -> None:
            if not isinstance(sys.exc_info()[1], OSError):  # a worker that breaks off says so
                super().handle_error(*given)

    with Listener((host, 0), Reader) as listener:
        Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield Offer(host, listener.server_address[1], token)
        finally:
            listener.shutdown()


class WeightReceiver:
    """A part of vLLM's worker, which `opsd` calls by /collective_rpc."""

    reload_weights: Callable[..., None]  # vLLM's

    def receive_weights(self, host: str, port: int, token: str) -> None:
        """Load the weights of an `Offer`. Nothing changes before the first has arrived."""
        with socket.create_connection((host, port), SILENT) as connection:
            connection.sendall(token.encode())
            with connection.makefile("rb") as stream:
                weights = read_weights(stream)
                first = next(weights)
                self.reload_weights(weights_iterator=chain([first], weights))


def write_weights(stream: BufferedIOBase, weights: Weights) -> None:
    """Write the tensors, of any dtype and device, one after the other."""
    for name, weight in weights:
        file = save({name: weight.detach().cpu().contiguous()})
        stream.write(len(file).to_bytes(8, "little"))
        stream.write(file)
    stream.write(bytes(8))


def read_weights(stream: BufferedIOBase) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors. Raises ConnectionError if the stream ends early."""
    while length := int.from_bytes(_exactly(stream, 8), "little"):
        yield from load(_exactly(stream, length)).items()


def _exactly(stream: BufferedIOBase, size: int) -> bytes:
    if len(content := stream.read(size)) < size:
        raise ConnectionError("the weights end early")
    return content
