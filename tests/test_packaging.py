"""What is built with and without a compiler, what a wheel holds, and whose threads the library
runs on.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
check = runpy.run_path(str(ROOT / "release" / "check.py"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy to build in: nothing built, nothing cached."""
    target = tmp_path_factory.mktemp("checkout") / "opsd"
    skipped = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, target, ignore=skipped)
    return target


def setup(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"OPSD_CUDA": "0", **environment}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=checkout,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "environment",
    # nvcc, where there is one, cannot do without a compiler either.
    [{"CXX": "/nonexistent/g++"}, {"CXX": "", "PATH": "/nonexistent", "OPSD_CUDA": ""}],
)
def test_without_a_compiler_the_library_is_left_out_and_said_so(environment, checkout):
    built = setup(checkout, "build_ext", "--inplace", **environment)
    assert built.returncode == 0, built.stderr
    assert built.stdout.count("No C++ compiler was found: opsd is built without") == 1
    assert ("'/nonexistent/g++', which CXX names" in built.stdout) == bool(environment["CXX"])
    assert not list(checkout.glob("opsd_kernels/*.so"))


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"OPSD_CPP": "1", "CXX": "/nonexistent/g++"}, "OPSD_CPP=1 demands the C++ kernels, but"),
        ({"OPSD_CPP": "yes"}, "OPSD_CPP: got 'yes', may be 0, 1 or unset"),
        ({"OPSD_CPP": "0", "OPSD_CUDA": "1", "PATH": "/nonexistent"}, "'g++', which was not found"),
        ({"CXX": "false"}, "false failed (exit status 1). OPSD_CPP=0 builds without it."),
    ],
)
def test_what_cannot_be_built_as_demanded_is_refused(environment, wanted, checkout):
    built = setup(checkout, "build_ext", "--inplace", **environment)
    assert built.returncode != 0
    assert wanted in built.stderr and "Traceback" not in built.stderr


def test_a_wheel_holds_the_packages_and_nothing_else(checkout, tmp_path):
    sources = {str(p.relative_to(checkout)) for p in checkout.rglob("*.*") if p.is_file()}
    built = setup(checkout, "bdist_wheel", "--dist-dir", str(tmp_path), OPSD_CPP="0")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    assert check["wheel_faults"](wheel, sources) == [f"{wheel.name} lacks the C++ kernels"]
    with zipfile.ZipFile(wheel, "a") as archive:
        for name in (
            "opsd_kernels/libopsd_cpu.so",
            "opsd_train.libs/libgomp.so",
            "tests/conftest.py",
        ):
            archive.writestr(name, b"")
    assert check["wheel_faults"](wheel, sources | {"opsd/new.py"}) == [
        f"{wheel.name} lacks opsd/new.py",
        f"{wheel.name} holds tests/conftest.py",
        f"{wheel.name} holds opsd_train.libs/libgomp.so",
    ]


def test_the_distribution_has_a_name_of_its_own():
    """`opsd` on PyPI is another project's: nothing here may tell anyone to install that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "opsd-train"
    places = ("*.md", "docs/*.md", "opsd/**/*.py", "opsd_kernels/**/*.py", "examples/**/*")
    wrong = re.compile(r"pip install [^\n`&|;#]*(?<![\w./-])opsd(?![\w/.-])|['\"]opsd\[")
    for path in (path for place in places for path in ROOT.glob(place) if path.is_file()):
        found = wrong.search(path.read_text())
        assert found is None, f"{path}: {found[0]}"


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="an sdist has no lock file")
def test_the_lock_file_has_all_that_is_asked_for():
    """What .ci/lock writes: .ci/run fetches nothing else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lines = (ROOT / ".ci" / "requirements.txt").read_text().splitlines()
    pinned = (line.split()[0] for line in lines if "==" in line and not line.startswith((" ", "#")))
    locked = dict(name.split("==") for name in pinned)
    for requirement in map(Requirement, asked):
        if not requirement.marker or requirement.marker.evaluate():
            assert requirement.specifier.contains(locked[requirement.name]), requirement


def test_mypys_exceptions_are_for_modules_that_are_there():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    for override in settings["overrides"]:
        names = override["module"]
        for name in [names] if isinstance(names, str) else names:
            path = ROOT / name.removesuffix(".*").replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), name


RUNTIMES = """
import torch
from opsd_kernels import linear_divergence
torch.set_num_threads(2)
hidden, weight = torch.randn(64, 32), torch.randn(1000, 32)
linear_divergence(hidden, hidden, weight, backend="cpp")
lines = open("/proc/self/maps").read().split()
print(*{part for part in lines if part.startswith("/") and "omp" in part.rsplit("/", 1)[1]})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernels_run_on_torchs_own_openmp():
    """A second runtime's threads would spin where the first one's want to run."""
    printed = subprocess.check_output([sys.executable, "-P", "-c", RUNTIMES], text=True)
    (runtime,) = printed.split()
    assert "/torch" in runtime
