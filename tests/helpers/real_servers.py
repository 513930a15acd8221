"""Real vLLM and SGLang servers in processes of their own: starts, asks and kills them.

They use the Python in OPSD_VLLM_PYTHON, of a venv made by `vllm_venv.sh`, and that in
OPSD_SGLANG_PYTHON, of one made by `sglang_venv.sh`.
"""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from opsd.rollout.server import RolloutServer
from opsd.rollout.sglang_client import SGLangServer
from opsd.rollout.vllm_client import VLLMServer

STARTS = 600.0  # seconds within which a server must answer
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
QUIET_VLLM = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}


def environment(**more: str) -> dict[str, str]:
    """This process's environment, without what is meant for our own Python."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | QUIET | more


class RealServer:
    """A server of the model in fp32; `more`: further arguments; `env`: variables."""

    engine: str  # as in rollout.engine
    client: type[RolloutServer]
    python: str

    def __init__(self, model: Path, log: Path, *more: str, **env: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log, self.more, self.env = model, log, more, env
        self.process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> "RealServer":
        """Start the server; `wait` waits until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command(), *self.more],
                env=environment(**self.env),
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


class RealVLLM(RealServer):
    """`vllm serve MODEL` in development mode."""

    engine, client = "vllm_server", VLLMServer
    python = os.environ.get("OPSD_VLLM_PYTHON", "")

    def __init__(self, model: Path, log: Path, *more: str, **env: str):
        super().__init__(model, log, *more, VLLM_SERVER_DEV_MODE="1", **QUIET_VLLM, **env)

    def command(self) -> list[str]:
        said = [str(Path(self.python).parent / "vllm"), "serve", str(self.model)]
        said += ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        return [*said, "--dtype", "float32", "--max-model-len", "256"]


class RealSGLang(RealServer):
    """`sglang.launch_server` with nothing but torch's own operators."""

    engine, client = "sglang_server", SGLangServer
    python = os.environ.get("OPSD_SGLANG_PYTHON", "")

    def __init__(self, model: Path, log: Path, *more: str, **env: str):
        super().__init__(model, log, *more, SGLANG_USE_CPU_ENGINE="1", **env)

    def command(self) -> list[str]:
        said = [self.python, "-m", "sglang.launch_server", "--model-path", str(self.model)]
        said += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        said += ["--dtype", "float32", "--context-length", "256", "--max-total-tokens", "20000"]
        said += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        said += ["--disable-overlap-schedule", "--cuda-graph-backend-decode", "disabled"]
        return [*said, "--cuda-graph-backend-prefill", "disabled"]
