"""The GPUs that a run can be planned for. Needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """By the maker: bytes of memory, bytes a second, dense bf16 operations a second."""

    memory: float
    bandwidth: float
    operations: float


GPUS = {
    "b200": GPU(180e9, 8.0e12, 2250e12),
    "h200": GPU(141e9, 4.8e12, 989e12),
    "h100": GPU(80e9, 3.35e12, 989e12),
    "a100": GPU(80e9, 2.04e12, 312e12),
    "a100-40": GPU(40e9, 1.56e12, 312e12),
    "l40s": GPU(48e9, 0.864e12, 362e12),
    "5090": GPU(32e9, 1.79e12, 209e12),
    "4090": GPU(24e9, 1.01e12, 165e12),
    "3090": GPU(24e9, 0.936e12, 71e12),
    "l4": GPU(24e9, 0.3e12, 121e12),
}
