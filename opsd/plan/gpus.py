"""The GPUs that a run can be planned for, from gpus.toml. Needs no torch."""

from dataclasses import dataclass

from opsd.common.files import read_toml


@dataclass(frozen=True)
class GPU:
    """What the maker states: bytes of memory, bytes a second, dense bf16 operations a second."""

    memory: float
    bandwidth: float
    operations: float


GPUS = {name: GPU(**facts) for name, facts in read_toml(__file__, "gpus").items()}
