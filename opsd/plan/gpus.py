"""The GPUs that a run can be planned for, from gpus.toml. Needs no torch."""

import re
from dataclasses import dataclass, replace

from opsd.common.files import read_toml


@dataclass(frozen=True)
class GPU:
    """The maker's bytes of memory, bytes and dense bf16 operations per second; 0: unknown."""

    memory: float
    bandwidth: float
    operations: float
    name: str = ""


GPUS = {name: GPU(**facts) for name, facts in read_toml(__file__, "gpus").items()}


def find_gpu(text: str) -> GPU | None:
    """Find a known GPU by a name such as `4090`, `RTX 4090`, `rtx4090` or `h100-sxm5-80gb`."""
    name = re.sub(r"[\s_-]+", "-", text.strip().lower())
    name = re.sub(r"^((nvidia|geforce|tesla|rtx)-?)+|-(sxm|pcie|nvl)\d?", "", name)
    if name not in GPUS:  # a10g is one
        name = re.sub(r"(?<=\d)(?=ti\b|super\b)", "-", name)
        name = re.sub(r"(?<=\d)gi?b?$", "", name)
    if name not in GPUS:  # the name may end with the memory
        name, _, memory = name.rpartition("-")
        if name not in GPUS or f"{GPUS[name].memory / 1e9:.0f}" != memory:
            return None
    return replace(GPUS[name], name=name.upper())
