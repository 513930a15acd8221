"""Addresses of servers, as a user writes them."""

from urllib.parse import urlsplit


def check_address(address: str) -> None:
    """Raises ValueError unless this is an HTTP server's address."""
    parts = urlsplit(address)
    parts.port  # noqa: B018 - raises ValueError for one beyond 65535
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ValueError("it must look like http://localhost:8000")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ValueError("it must be the server's own address, without /v1")
