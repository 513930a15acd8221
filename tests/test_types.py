"""The types of opsd and opsd_kernels agree, by mypy."""

import subprocess
import sys
from pathlib import Path


def test_mypy_finds_no_error(tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    said = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
