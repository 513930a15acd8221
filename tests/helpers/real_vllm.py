"""A real vLLM server in a process of its own: starts, asks and kills it.

It uses the Python in OPSD_VLLM_PYTHON, of a venv made by `vllm_venv.sh`.
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

PYTHON = os.environ.get("OPSD_VLLM_PYTHON", "")
STARTS = 600.0  # seconds within which a server must answer
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}


def environment(**more: str) -> dict[str, str]:
    """This process's environment, without what is meant for our own Python."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | QUIET | more


class RealServer:
    """`vllm serve MODEL` in development mode, in fp32; `more`: further arguments."""

    def __init__(self, model: Path, log: Path, *more: str, dev: bool = True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log, self.more, self.dev = model, log, more, dev
        self.process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "RealServer":
        """Start the server; `wait` waits until it answers."""
        command = [str(Path(PYTHON).parent / "vllm"), "serve", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        command += ["--dtype", "float32", "--max-model-len", "256", *self.more]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=environment(VLLM_SERVER_DEV_MODE=str(int(self.dev))),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def wait(self) -> "RealServer":
        """Wait until it answers."""
        until = time.monotonic() + STARTS
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, f"no answer after {STARTS:.0f} s"
            time.sleep(0.5)
        return self

    def answers(self) -> bool:
        try:
            with urlopen(f"{self.address}/health", timeout=5) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        """Send SIGKILL to the server and its engine."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
