"""Build of the C++ and CUDA kernels: plain shared libraries with a C interface, loaded with ctypes.

Neither torch nor Python headers are needed, so `pip install .` downloads nothing for the build but
setuptools, and one wheel serves every Python and torch version. csrc/cpu.cpp and attention.cpp are
compiled once an instruction set; csrc/cpu_dispatch.cpp chooses among them at run time.
csrc/product.cpp is for x86-64 alone; csrc/cuda.cu needs nvcc.

Each library is built where its compiler is found. OPSD_CPP=1 and OPSD_CUDA=1 demand them, 0 leaves
them out; what is not built, `opsd_kernels.backends()` says, and torch serves in its place.
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
CPP, CUDA = "opsd_kernels.libopsd_cpu", "opsd_kernels.libopsd_cuda"
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
GPUS = ("80", "90a", "100", "120")

NO_COMPILER = (
    "No C++ compiler was found: opsd is built without the C++ kernels; on the CPU the torch backend"
    " takes their place, and is slower. For the kernels install a compiler (Debian/Ubuntu: apt-get "
    "install g++) or name one in the environment variable CXX, and install opsd again."
)


def wanted(variable: str) -> bool | None:
    """Whether the environment demands a library or leaves it out; None: where it can be built."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"opsd: {variable}: got {value!r}, may be 0, 1 or unset.")
    return None if value == "" else value == "1"


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None to build without the C++ kernels."""
    demanded = wanted("OPSD_CPP")
    if demanded is False:
        return None
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else (["g++"], ["clang++"], ["c++"]):
        if shutil.which(command[0]):
            return command
    if named:
        print(f"opsd: the compiler {named[0]!r}, which CXX names, was not found.", flush=True)
    if demanded:
        raise SystemExit(
            "opsd: OPSD_CPP=1 demands the C++ kernels, but no C++ compiler was found. Install one "
            "(Debian/Ubuntu: apt-get install g++) or name one in the environment variable CXX."
        )
    print(f"opsd: {NO_COMPILER}", flush=True)
    return None


def find_nvcc() -> str | None:
    """nvcc, or None to build without the CUDA kernels."""
    demanded = wanted("OPSD_CUDA")
    if demanded is False:
        return None
    host = os.environ.get("NVCC_CCBIN", "g++")
    if not shutil.which(host):
        if demanded:
            raise SystemExit(
                "opsd: OPSD_CUDA=1 demands the CUDA kernels, and nvcc compiles with the compiler "
                f"{host!r}, which was not found. Install it, or name another in NVCC_CCBIN."
            )
        return None
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [f"{home}/bin" for home in (*homes, "/usr/local/cuda") if home]
    for path in (None, *places):
        if found := shutil.which("nvcc", path=path):
            return found
    if demanded:
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

    def run(self) -> None:
        self.compilers = {CPP: find_compiler(), CUDA: find_nvcc()}
        self.extensions = [ext for ext in self.extensions if self.compilers[ext.name]]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        build = self.build_cuda if ext.name == CUDA else self.build_cpu
        build(self.compilers[ext.name], target)

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

    def build_cpu(self, compiler: list[str], target: Path) -> None:
        known = [f"-DOPSD_HAVE_{name.upper()}" for name in INSTRUCTION_SETS]
        with tempfile.TemporaryDirectory() as scratch:
            units = [
                (CSRC / f"{unit}.cpp", f"{scratch}/{unit}_{name}.o", [*flags, f"-DOPSD_ISA={name}"])
                for name, flags in INSTRUCTION_SETS.items()
                for unit in ("cpu", "attention", "product")
            ]
            units.append((CSRC / "cpu_dispatch.cpp", f"{scratch}/dispatch.o", known))
            commands = [
                [*compiler, *FLAGS, *flags, "-c", str(source), "-o", out]
                for source, out, flags in units
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(self.compile, commands))
            objects = [out for _, out, _ in units]
            self.compile([*compiler, "-shared", *openmp(compiler), *objects, "-o", str(target)])

    def compile(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            library = "CUDA" if "nvcc" in command[0] else "CPP"
            raise SystemExit(
                f"opsd: {command[0]} failed (exit status {error.returncode}). OPSD_{library}=0 "
                "builds without it."
            ) from None


def openmp(compiler: list[str]) -> list[str]:
    """What links OpenMP's runtime in: nothing, where it is GNU's.

    opsd_kernels/tiles/cpp.py binds its functions to the runtime that torch brings. A second runtime
    would have threads of its own, which spin where torch's want to run; and libgomp is no part of
    manylinux, so that a wheel would have to bring it.
    """
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return ["-fopenmp"] if "clang" in version else []


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, not on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            CPP,
            sources=[f"csrc/{x}.cpp" for x in ("cpu", "attention", "product", "cpu_dispatch")],
            depends=[
                f"csrc/{x}.h"
                for x in ("attention", "bf16", "cpu", "divergence", "product", "vector")
            ],
        ),
        Extension(
            CUDA,
            sources=["csrc/cuda.cu"],
            depends=[f"csrc/{x}.h" for x in ("cpu", "cuda_chunk", "cuda_rows", "divergence")],
        ),
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
