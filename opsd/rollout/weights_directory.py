"""Where a run leaves weights for its server: in memory that both see, or in a directory."""

import os
import shutil
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from opsd.common.system import memory
from opsd.config.sections import RolloutSection

WEIGHTS = "weights-for-vllm"  # in the directory of a run, or of an evaluation
MEMORY = Path("/dev/shm")  # Linux's file system in memory
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def weights_directory(section: RolloutSection, run: Path, needed: int) -> Path:
    """For this run alone, with room for so many bytes."""
    own = f"opsd-{sha256(str(run).encode()).hexdigest()[:12]}"
    if section.weights_dir is not None:
        return Path(section.weights_dir) / own
    engine = section.engine.removesuffix("_server")
    return MEMORY / own if _in_memory(engine, section.server or "", needed) else run / WEIGHTS


def _in_memory(engine: str, address: str, needed: int) -> bool:
    """Whether MEMORY has room, and the server sees the same files as this process: vLLM ends where
    it cannot read weights, so what is not known to be so is not tried."""
    parts = urlsplit(address)
    if parts.hostname not in LOOPBACK or not MEMORY.is_dir():
        return False
    room = min(shutil.disk_usage(MEMORY).free, memory()[1])
    return room > 2 * needed and _is_local(engine, parts.port or 80)


def _is_local(engine: str, port: int) -> bool:
    """Whether an engine with this process's mounts listens there: not a tunnel to another
    machine's, nor a container's door."""
    import psutil  # as in common/system

    try:
        listeners = {
            found.pid
            for found in psutil.net_connections("tcp")
            if found.status == psutil.CONN_LISTEN and found.laddr.port == port
        }
        return bool(listeners) and all(
            psutil.Process(pid).name().lower().startswith(("python", engine))
            and any(engine in argument.lower() for argument in psutil.Process(pid).cmdline())
            and os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
            for pid in listeners
        )
    except (psutil.Error, OSError, TypeError):  # somebody else's, whose pid is not shown
        return False
