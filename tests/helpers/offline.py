"""Lists what each GPU kernel uses of an SM: Triton's are compiled here (no GPU needed), CUDA's are
in the library that setup.py built.

    python tests/helpers/offline.py > docs/kernels-gpu.json

--most-used: only the variants of Triton's kernels that a plain call uses, and without a clip for
other targets than sm_90.
"""

import heapq
import itertools
import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opsd_kernels.divergence import DIVERGENCES
from opsd_kernels.tiles import cuda
from opsd_kernels.tiles import triton as tiles
from opsd_kernels.tiles import triton_kernels as kernels

POINTERS = {"targets": "*i64", "out": "*bf16", "x": "*bf16", "by": "*fp32"} | dict.fromkeys(
    ("student", "teacher", "bias", "teacher_bias", "logits", "state", "partials", "row_weight"),
    "*fp32",
)
NUMBERS = (
    "inner",
    "outer",
    "teacher_inner",
    "teacher_outer",
    "inverse",
    "factor",
    "beta",
    "threshold",
)
# As Triton compiles a call whose vocabulary is a multiple of 16; where it is not, each load is of
# 4 bytes.
MULTIPLES_OF_16 = ("v", "stride", "student_stride", "teacher_stride", "out_stride", "count")
CAPABILITIES = (80, 90, 100, 120)
ROWWISE = {"merge": 128, "add": 128}  # chunks in a row with V = 262144


def variants(most_used: bool):
    """Yield (the kernel's name, its constants, its absent arguments, warps)."""
    plain = ("bias", "teacher_bias", "inner", "teacher_inner")
    for name, block in ROWWISE.items():
        yield name, {"BLOCK": block}, (), 1
    yield "scale", {"BLOCK": tiles.SCALED}, (), tiles.SCALING_WARPS
    for softcap, absent in ((False, plain),) if most_used else ((False, plain), (True, ())):
        common = {"SOFTCAP": softcap, "BLOCK": tiles.CHUNK}
        both = common | {"TEACHER_SOFTCAP": softcap}
        yield "normalisers", both, absent, tiles.WARPS
        yield "target", common | {"BLOCK": 128}, absent, 4
        yield "log_prob_gradient", common, absent, tiles.WARPS
        for kind, clip in itertools.product(range(len(DIVERGENCES) + 1), (False, True)):
            chosen = both | {"KIND": kind, "CLIP": clip}
            yield "sums", chosen, absent, tiles.WARPS
            for known in (True,) if clip else (True, False):
                yield "gradient", chosen | {"SUMS_KNOWN": known}, absent, tiles.WARPS


def compile_kernel(capability: int, name: str, constants: dict, absent: tuple, warps: int) -> dict:
    function = getattr(kernels, name)
    signature, values, attributes = {}, {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants or argument in absent:
            signature[argument], values[(i,)] = "constexpr", constants.get(argument)
        elif argument in POINTERS:
            signature[argument] = POINTERS[argument]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument in NUMBERS else "i32"
            if argument in MULTIPLES_OF_16:
                attributes[(i,)] = [["tt.divisibility", 16]]
    kernel = triton.compile(
        ASTSource(function, signature, values, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (usage,) = resource_usage(file.name)
        (code,) = instructions(file.name)
    usage |= {"name": name, "target": f"sm_{capability}", **constants}
    usage |= {"shared_bytes": kernel.metadata.shared}
    return usage | {kind: code[kind] for kind in ("loads_128", "loads_32", "shortest_way")}


def resource_usage(binary: str) -> list[dict]:
    """For every kernel in a cubin or a library: architecture, name, registers, and bytes of stack,
    spills and shared memory.
    """
    out = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found, target, name = [], "", ""
    for line in out.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            target = match[1]
        elif match := re.search(r"Function (\w+):", line):
            name = re.sub(r".*_cuda_cu_[0-9a-f]{8}\d+", "", match[1])  # remove the file's namespace
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, spilled = map(int, match.groups())
            found.append(
                {
                    "name": name,
                    "target": target,
                    "registers": registers,
                    "stack_bytes": stack,
                    "spilled_bytes": spilled,
                    "shared_bytes": shared,
                }
            )
    return found


def instructions(library: str) -> list[dict]:
    """For every kernel in a library: the numbers of instructions, of branches and of loads of each
    width in its code (SASS), and the number of instructions on its shortest path, and how many of
    these are in loops. That is the path of a thread with all its entries, aligned, without bias,
    and with nothing to add up. Divided by a thread's 16 entries it is the cost of an entry. `rows`
    has loops, through each of which that path passes once, with four entries.
    """
    path = triton.knobs.nvidia.cuobjdump.path
    out = subprocess.run(
        [path, "--dump-sass", library], capture_output=True, text=True, check=True
    ).stdout
    found, target, code_of = [], "", []
    for line in out.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            target = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            code_of.append([])
            name = re.sub(r".*_cuda_cu_[0-9a-f]{8}\d+", "", match[1])
            kinds = ("instructions", "branches", "loads_128", "loads_32", "copies_128")
            counts = dict.fromkeys(kinds, 0)
            found.append({"name": name, "target": target, **counts})
        elif match := re.search(SASS, line):
            code, kernel = match[3], found[-1]
            code_of[-1].append(match.groups())
            kernel["instructions"] += code != "NOP"
            kernel["copies_128"] += code == COPY_128
            kernel["branches"] += code.split(".")[0] in ("BRA", "BRX")
            if code.startswith("LDG"):
                kernel["loads_128" if ".128" in code else "loads_32"] += 1
    for kernel, code in zip(found, code_of, strict=True):
        way = _shortest_way(code)
        kernel["shortest_way"], kernel["looped"] = len(way), _looped(code, way)
    return found


SASS = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*)"


Code = list[tuple[str, str | None, str, str]]
"""Address, predicate, operation and operands of each instruction."""


def _shortest_way(code: Code) -> list[int]:
    """The instructions from the first to an exit, as indices. It leads through the copies of 16
    bytes to shared memory and the last store of a gradient's four entries, if there are any.
    """
    stops = [k for k, (_, _, operation, _) in enumerate(code) if operation == COPY_128]
    stops += [k for k, (_, _, operation, _) in enumerate(code) if operation == STORE_64][-1:]
    way = [0]
    for stop in (*stops, None):
        way += _way(code, way[-1], stop)[1:]
    return way


COPY_128, STORE_64 = "LDGSTS.E.BYPASS.128", "STG.E.64"


def _way(code: Code, start: int, stop: int | None) -> list[int]:
    """The shortest way to an instruction; None: to an exit."""
    before, queue = {start: (1, None)}, [(1, start)]
    while queue:
        length, k = heapq.heappop(queue)
        _, predicate, operation, operands = code[k]
        if k == stop or (stop is None and operation == "EXIT" and predicate is None):
            way = [k]
            while (previous := before[way[-1]][1]) is not None:
                way.append(previous)
            return way[::-1]
        conditional = predicate is not None or "P" in operands
        following = [k + 1] if conditional or not operation.startswith("BRA") else []
        for following_k in (*following, *_target(code, k)):
            if following_k < len(code) and length + 1 < before.get(following_k, (2**62,))[0]:
                before[following_k] = (length + 1, k)
                heapq.heappush(queue, (length + 1, following_k))
    raise ValueError("no exit")


def _target(code: Code, k: int) -> tuple[int, ...]:
    """Where a branch leads, as index."""
    there = re.search(r"0x([0-9a-f]+)", code[k][3]) if code[k][2].startswith("BRA") else None
    if there is None:
        return ()
    return tuple(i for i, (address, *_) in enumerate(code) if int(address, 16) == int(there[1], 16))


def _looped(code: Code, way: list[int]) -> int:
    """The instructions of `way` that a branch of it, which leads back, would repeat."""
    repeated: set[int] = set()
    for place, k in enumerate(way):
        for target in _target(code, k):
            if target <= k and target in way:
                repeated.update(way[way.index(target) : place + 1])
    return len(repeated)


if __name__ == "__main__":
    few = "--most-used" in sys.argv
    found = {
        "triton_version": triton.__version__,
        "triton": [
            compile_kernel(capability, *variant)
            for capability in CAPABILITIES
            for variant in variants(few)
            if capability == 90 or not (few and variant[1].get("CLIP"))
        ],
        "cuda": resource_usage(str(cuda.LIBRARY)) if cuda.LIBRARY.exists() else [],
        "cuda_code": instructions(str(cuda.LIBRARY)) if cuda.LIBRARY.exists() else [],
    }
    print(json.dumps(found, indent=1))
