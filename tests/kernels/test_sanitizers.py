"""The C++ library, built with AddressSanitizer and UndefinedBehaviorSanitizer, touches no memory
but its arguments' and does nothing undefined.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# After setup.py's own flags, of which -O3 would take a minute.
COMPILER = """#!/bin/sh
exec g++ "$@" -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The library as setup.py builds it, every instruction set, and the sanitizers in it."""
    place = tmp_path_factory.mktemp("sanitized")
    compiler = place / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(place)]
    environment = {**os.environ, "CXX": str(compiler), "OPSD_CUDA": "0"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return place / "opsd_kernels" / "libopsd_cpu.so"


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    asan = subprocess.check_output(["g++", "-print-file-name=libasan.so"], text=True).strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": asan,  # Python itself is built without
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, ROOT / "tests" / "helpers" / "sanitized.py", library, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_function_is_clean(library):
    found = run(library)
    assert found.returncode == 0, found.stderr[:4000]
    assert "baseline" in found.stdout.split()


def test_an_overrun_would_be_seen(library):
    found = run(library, "overrun")
    assert found.returncode != 0
    assert "heap-buffer-overflow" in found.stderr and "csrc/cpu.cpp" in found.stderr, found.stderr
