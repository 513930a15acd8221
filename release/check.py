"""What is in a release, held against the checkout: python release/check.py DIST

Exits with 1 and a line for each thing that is missing or should not be there.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("opsd/", "opsd_kernels/")
LIBRARIES = {"opsd_kernels/libopsd_cpu.so", "opsd_kernels/libopsd_cuda.so"}
# Of the checkout, what serves the repository and not those who build from the sdist.
NOT_IN_SDIST = (".ci/", ".clang-format", ".gitignore")
TAG = re.compile(r"-py3-none-(manylinux\w+_x86_64\.)+whl$")
LARGEST = 100_000_000  # bytes; PyPI's own limit for a file


def tracked() -> set[str]:
    listed = subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True)
    return set(listed.split("\n")) - {""}


def compare(what: str, found: set[str], expected: set[str]) -> list[str]:
    lines = [f"{what} lacks {name}" for name in sorted(expected - found)]
    return lines + [f"{what} holds {name}" for name in sorted(found - expected)]


def wheel_faults(path: Path, sources: set[str]) -> list[str]:
    """A wheel holds the two packages as they are tracked, the libraries and its metadata."""
    entries = zipfile.ZipFile(path).namelist()
    names = [n for n in entries if ".dist-info/" not in n and not n.endswith("/")]
    expected = {name for name in sources if name.startswith(PACKAGES)}
    libraries = {name for name in names if name.endswith(".so")}
    faults = compare(path.name, set(names) - libraries, expected)
    faults += [f"{path.name} holds {name}" for name in libraries - LIBRARIES]
    if "opsd_kernels/libopsd_cpu.so" not in libraries:
        faults.append(f"{path.name} lacks the C++ kernels")
    if len(names) != len(set(names)):
        faults.append(f"{path.name} holds a file twice")
    if path.stat().st_size > LARGEST:
        faults.append(f"{path.name} is larger than PyPI takes: {path.stat().st_size} bytes")
    return faults


def sdist_faults(path: Path, sources: set[str]) -> list[str]:
    """An sdist holds what is tracked, and metadata."""
    with tarfile.open(path) as archive:
        members = [member.name for member in archive.getmembers() if member.isfile()]
    names = {name.split("/", 1)[1] for name in members}
    made = {name for name in names if name.startswith("opsd_train.egg-info/")} | {
        "PKG-INFO",
        "setup.cfg",
    }
    expected = {name for name in sources if not name.startswith(NOT_IN_SDIST)}
    return compare(path.name, names - made, expected)


def main(directory: str) -> int:
    sources, dist = tracked(), Path(directory)
    wheels, sdists = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    faults = [] if wheels and sdists else [f"{dist} lacks a wheel or an sdist"]
    for path in wheels:
        if not TAG.search(path.name):
            faults.append(f"{path.name} is not for every Python 3 on manylinux x86-64")
        faults += wheel_faults(path, sources)
    for path in sdists:
        faults += sdist_faults(path, sources)
    for line in faults:
        print(line)
    if not faults:
        for path in (*wheels, *sdists):
            print(f"{path}: as it should be, {path.stat().st_size / 1e6:.1f} MB")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
