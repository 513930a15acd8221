"""Check the server addresses that users write."""

import re
from urllib.parse import urlsplit


def is_address(path: str | None) -> bool:
    """Whether a path field holds an HTTP address instead of a path."""
    return path is not None and path.startswith(("http://", "https://"))


def check_address(address: str, key: str = "VLLM_API_KEY or SGLANG_API_KEY") -> None:
    """Raises ValueError unless this is an HTTP server's address without a user name or password: it
    is written into a run's config.yaml. key: the environment variable that the error suggests."""
    if re.search(r"[\s\\\x00-\x1f\x7f]", address):
        raise ValueError("it holds a blank or a character that an address may not have")
    parts = urlsplit(address)
    parts.port  # noqa: B018 - raises ValueError for one beyond 65535
    if "@" in parts.netloc:
        raise ValueError(
            "it holds a user's name or password, which would be written into files; give the "
            f"server's key by the environment variable {key}"
        )
    plain = not parts.query and not parts.fragment and parts.path.isascii()
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ValueError("it must look like http://localhost:8000")
    try:
        parts.hostname.encode("idna")
    except UnicodeError:
        raise ValueError(f"{parts.hostname[:80]!r} is no host's name") from None
    if parts.path.rstrip("/").endswith("/v1"):
        raise ValueError("it must be the server's own address, without /v1")
