"""The commands of a session on a GPU, their time limits and their rehearsals.

A GPU is lent for thirty minutes, ten a call, on a machine without access to package registries. No
part may use another's time, so each has a limit, and the parts of a call fit into ten minutes.
"""

from dataclasses import dataclass

CALL_SECONDS, SITTING_SECONDS = 600, 1800

# Packages that an image with torch 2.11, triton 3.6, transformers 5.17 and pytest lacks.
WHEELS = (
    *("pydantic==2.14.4", "pydantic-core==2.50.5", "annotated-types==0.8.0"),
    *("typing-extensions==4.16.0", "typing-inspection==0.4.5"),
    *("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "gguf==0.19.0"),
    *("math-verify==0.9.0", "latex2sympy2-extended==1.11.0", "antlr4-python3-runtime==4.13.2"),
    *("trl==1.16.0", "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"),
)

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
# Three processes share the GPU. A rehearsal only collects the tests, which imports them.
TESTS = (*PYTEST, "-n", "3", "--dist", "load", "--maxfail=25", "-m", "gpu", "-rfE")
COLLECT = (*PYTEST, "--collect-only", "-m", "gpu")
NEVER = "no rehearsal: needs the GPU itself"


@dataclass(frozen=True)
class Part:
    """A command of a call. `arguments` are for Python, or for `tool` if one is named; {out} is the
    call's output folder. `rehearsal`: the arguments on a CPU; a string: why it does not run there.
    `results`: the JSON that it leaves in that folder, if no argument names one.
    """

    name: str
    seconds: int
    arguments: tuple[str, ...]
    rehearsal: tuple[str, ...] | str
    tool: str | None = None
    results: str = ""


def _tests(*paths: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (*TESTS, *paths), (*COLLECT, *paths)


MEMCHECKED = ("tests/kernels/test_gpu_backends.py", "-k", "test_tiles and cuda and plain")
NCU = tuple(
    "--clock-control none --set basic --csv --kernel-name regex:normalisers|sums|gradient".split()
)
BENCH = ("-m", "benchmarks")
STEP = ("-m", "benchmarks.step", "--output", "{out}/step.json")
TRL_STEP = ("-m", "benchmarks.trl_step", "--rounds", "1", "--output", "{out}/trl.json")
TINY_STEP = ("--case", "1,2,8,16,8", "--rounds", "1", "--threads", "1")
TINY_TRL = tuple(
    "--problems 1 --rollouts 2 --solution 20 --length 8 --steps 2 --vocabulary 256 --width 32 "
    "--layers 1 --heads 2 --batch 2".split()
)
CALLS: dict[str, tuple[Part, ...]] = {
    # Correctness. If something fails, stop, fix it, and begin again.
    "check": (
        Part(
            "smoke",
            120,
            ("-m", "benchmarks.gpu.smoke", "--json", "{out}/smoke.json"),
            ("-m", "benchmarks.gpu.smoke", "--cpu", "--json", "{out}/smoke.json"),
        ),
        Part(
            "terms",
            110,
            ("-m", "benchmarks.gpu.terms", "--json", "{out}/terms.json"),
            ("-m", "benchmarks.gpu.terms", "--cpu", "--json", "{out}/terms.json"),
        ),
        Part("kernels", 220, *_tests("tests/kernels")),
        Part("attention", 100, *_tests("tests/prefix")),
    ),
    # The goals: kernels and their peers.
    "bench": (
        Part(
            "bench",
            510,
            (*BENCH, "--gpu", "--minutes", "7.5", "--output", "{out}"),
            (*BENCH, "--shape", "8,64,8", "--rounds", "1", "--only", "dense", "--output", "{out}"),
            results="results.json",
        ),
    ),
    # Whole steps: our attention kernels, and TRL's trainer.
    "step": (
        Part(
            "step",
            200,
            (*STEP, "--gpu", "--compile", "--rounds", "3", "--seconds", "12"),
            (*STEP, *TINY_STEP),
        ),
        Part(
            "trl_step",
            170,
            (*TRL_STEP, "--gpu"),
            (*TRL_STEP, *TINY_TRL),
        ),
    ),
    # If time is left: whole runs, and profilers.
    "rest": (
        Part(
            "memcheck",
            110,
            (*"--tool memcheck --launch-timeout 0 {python}".split(), *PYTEST, "-x", *MEMCHECKED),
            NEVER,
            tool="compute-sanitizer",
        ),
        Part(
            "counters",
            60,
            (*NCU, *"--launch-count 12 {python} -m benchmarks.gpu.terms --once".split()),
            NEVER,
            tool="ncu",
        ),
        Part("runs", 120, *_tests("tests/training")),
    ),
}
