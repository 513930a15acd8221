"""Where a run leaves weights for its server: in memory that both see, or in a directory."""

import os
import shutil
import stat
import time
from hashlib import sha256
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from opsd.common.errors import UserError
from opsd.common.files import append_to, try_lock
from opsd.common.system import memory
from opsd.config.sections import RolloutSection

WEIGHTS = "weights-for-vllm"  # in the directory of a run, or of an evaluation
MEMORY = Path("/dev/shm")  # Linux's file system in memory
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LOCK, YOUNG = "lock", 60.0  # seconds within which a directory that is being made is left alone


def held(directory: Path) -> IO[bytes]:
    """Lock the directory until the file is closed or the process ends: it is in use."""
    file = append_to(directory / LOCK)
    try_lock(file)
    return file


def remove_left() -> None:
    """Remove the weights in memory that runs of this user left there when they were killed. A
    directory of such a name without a lock is another program's."""
    for left in MEMORY.glob("opsd-*"):
        try:
            known = left.lstat()
            young = time.time() - known.st_mtime < YOUNG
            ours = stat.S_ISDIR(known.st_mode) and known.st_uid == os.getuid()
            if not ours or young or not (left / LOCK).is_file():
                continue
            with append_to(left / LOCK) as file:
                if try_lock(file):
                    shutil.rmtree(left)
        except (OSError, UserError):  # another run removes it
            continue


def weights_directory(section: RolloutSection, run: Path, needed: int) -> Path:
    """Where this run leaves its weights: a directory of its own, with room for `needed` bytes."""
    own = f"opsd-{sha256(str(run).encode()).hexdigest()[:12]}"
    if section.weights_dir is not None:
        return Path(section.weights_dir) / own
    engine = section.engine.removesuffix("_server")
    remove_left()
    return MEMORY / own if _in_memory(engine, section.server or "", needed) else run / WEIGHTS


def _in_memory(engine: str, address: str, needed: int) -> bool:
    """Whether MEMORY has room, and the server certainly sees this process's files: vLLM ends where
    it cannot read weights."""
    parts = urlsplit(address)
    if parts.hostname not in LOOPBACK or not MEMORY.is_dir():
        return False
    room = min(shutil.disk_usage(MEMORY).free, memory()[1])
    return room > 2 * needed and _is_local(engine, parts.port or 80)


def _is_local(engine: str, port: int) -> bool:
    """Whether an engine with this process's mounts listens there: no tunnel, and no container."""
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
