"""Build of the C++ kernels: plain shared libraries with a C interface, loaded with ctypes.

Neither torch nor Python headers are needed, so `pip install .` downloads nothing for the build but
setuptools, and one wheel serves every Python and torch version. csrc/cpu.cpp is compiled once an
instruction set; csrc/cpu_dispatch.cpp chooses among them at run time.
"""

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
# No errno and no traps: both would stop the compiler from vectorising. Infinities and NaN keep
# their meaning, so -ffast-math is out.
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
AVX512 = [
    "-mavx512f",
    "-mavx512dq",
    "-mavx512bw",
    "-mavx512vl",
    "-mfma",
    "-mprefer-vector-width=512",
]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {"avx2": ["-mavx2", "-mfma"], "avx512": AVX512}


def find_compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise SystemExit(
        "opsd: no C++ compiler found. The kernels are built from csrc/ at install time: install "
        "one (Debian/Ubuntu: apt-get install g++) or name one in the environment variable CXX."
    )


class BuildKernels(build_ext):
    """Runs the compiler itself: what setuptools would build is a Python module, and this is not
    one.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        known = [f"-DOPSD_HAVE_{name.upper()}" for name in INSTRUCTION_SETS]
        with tempfile.TemporaryDirectory() as scratch:
            units = [
                (CSRC / "cpu.cpp", f"{scratch}/{name}.o", [*flags, f"-DOPSD_ISA={name}"])
                for name, flags in INSTRUCTION_SETS.items()
            ]
            units.append((CSRC / "cpu_dispatch.cpp", f"{scratch}/dispatch.o", known))
            commands = [
                [*compiler, *FLAGS, *flags, "-c", str(source), "-o", out]
                for source, out, flags in units
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(self.compile, commands))
            objects = [out for _, out, _ in units]
            self.compile([*compiler, "-shared", "-fopenmp", *objects, "-o", str(target)])

    def compile(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit(
                f"opsd: the C++ compiler {command[0]!r} (from CXX) was not found."
            ) from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"opsd: the C++ compiler failed (exit status {error.returncode})."
            ) from None


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, not on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "opsd_kernels.libopsd_cpu",
            sources=["csrc/cpu.cpp", "csrc/cpu_dispatch.cpp"],
            depends=["csrc/cpu.h", "csrc/divergence.h", "csrc/vector.h"],
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
