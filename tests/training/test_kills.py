"""A killed run, resumed, is the undisturbed one. `python -m tests.helpers.kills` kills more."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_runs_end_as_undisturbed_ones():
    command = [sys.executable, "-m", "tests.helpers.kills", "--kills", "2", "--method", "opsd"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 runs ended differently" in done.stdout
