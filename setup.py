"""Build of the C++ and CUDA kernels: plain shared libraries with a C interface, loaded with ctypes.

Neither torch nor Python headers are needed, so `pip install .` downloads nothing for the build but
setuptools, and one wheel serves every Python and torch version. csrc/cpu.cpp is compiled once an
instruction set; csrc/cpu_dispatch.cpp chooses among them at run time. csrc/cuda.cu is compiled
where nvcc is found: OPSD_CUDA=1 demands it, OPSD_CUDA=0 leaves it out.
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


# A100 and its kin, Hopper, Blackwell, and PTX for what comes after: those of them that nvcc knows.
GPUS = ("80", "90a", "100")


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


def find_nvcc() -> str | None:
    """nvcc, or None to build without CUDA."""
    wanted = os.environ.get("OPSD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"opsd: OPSD_CUDA: got {wanted!r}, may be 0, 1 or unset.")
    if wanted == "0":
        return None
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [f"{home}/bin" for home in (*homes, "/usr/local/cuda") if home]
    for path in (None, *places):
        if found := shutil.which("nvcc", path=path):
            return found
    if wanted == "1":
        raise SystemExit(
            "opsd: OPSD_CUDA=1 demands the CUDA kernels, but no nvcc was found on PATH, in "
            "CUDA_HOME or in /usr/local/cuda. Install the CUDA toolkit (12.4 or newer) or set "
            "CUDA_HOME."
        )
    return None


class BuildKernels(build_ext):
    """Runs the compilers itself: what setuptools would build is a Python module, and this is not
    one.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("cuda"):
            self.build_cuda(find_nvcc(), target)
        else:
            self.build_cpu(target)

    def build_cuda(self, nvcc: str, target: Path) -> None:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        # "90a" is not listed by itself: whoever knows compute_90 knows it.
        known = [gpu for gpu in GPUS if f"compute_{gpu.rstrip('a')}" in listed.split()]
        if not known:
            raise SystemExit(
                f"opsd: {nvcc} knows none of sm_{', sm_'.join(GPUS)}: set OPSD_CUDA=0."
            )
        newest = known[-1].rstrip("a")
        codes = [f"arch=compute_{gpu},code=sm_{gpu}" for gpu in known]
        codes.append(f"arch=compute_{newest},code=compute_{newest}")
        flags = ["-std=c++17", "-O3", "-ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags += ["-shared", "-cudart", "static", "--threads", "0"]  # all architectures at once
        for code in codes:
            flags += ["-gencode", code]
        self.compile([nvcc, *flags, str(CSRC / "cuda.cu"), "-o", str(target)])

    def build_cpu(self, target: Path) -> None:
        compiler = find_compiler()
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
                f"opsd: the compiler {command[0]!r} (from CXX) was not found."
            ) from None
        except subprocess.CalledProcessError as error:
            without = " OPSD_CUDA=0 builds without CUDA." if "cuda.cu" in " ".join(command) else ""
            raise SystemExit(
                f"opsd: {command[0]} failed (exit status {error.returncode}).{without}"
            ) from None


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, not on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


extensions = [
    Extension(
        "opsd_kernels.libopsd_cpu",
        sources=["csrc/cpu.cpp", "csrc/cpu_dispatch.cpp"],
        depends=["csrc/cpu.h", "csrc/divergence.h", "csrc/vector.h"],
    )
]
if find_nvcc():
    extensions.append(
        Extension(
            "opsd_kernels.libopsd_cuda",
            sources=["csrc/cuda.cu"],
            depends=["csrc/cpu.h", "csrc/divergence.h"],
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
