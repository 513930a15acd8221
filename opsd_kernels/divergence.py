"""Describes what is computed: the divergence, its clip, and how logits are made of a head's
products.

Notation, in this package: N tokens, V vocabulary, D hidden width; S and T are the student's and the
teacher's distribution over the vocabulary at one token, z and t their logits.
"""

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
CLIPS = ("entry", "token")


def _is_number(x: Any) -> bool:
    """Whether x is a finite number and no tensor: a trained temperature would get no gradient."""
    infinity: Any = float("inf")
    return isinstance(x, Real) and -infinity < x < infinity


@dataclass(frozen=True)
class Divergence:
    """A divergence of two distributions S (the student's, logits z) and T (the teacher's), in nats.

        name         D                                     dD/dz
        forward_kl   KL(T|S) = sum T (log T - log S)       S - T
        reverse_kl   KL(S|T) = sum S (log S - log T)       S (r - sum S r),  r = log S - log T
        jsd          b KL(T|M) + (1-b) KL(S|M)             (1-b) S (r - sum S r),  r = log S - log M
                     M = b T + (1-b) S, 0 < b < 1

    `beta` (b) is the teacher's share of jsd's mixture, the generalised JSD of GKD (arXiv
    2306.13649). Its limit at b -> 0 or 1 is 0, not a KL: three names, and no b that means a KL.

    Raises ValueError for another name, or a beta that is not strictly between 0 and 1. Tensors
    below fp64 take a beta between 1e-4 and 1 - 1e-4: beyond, the divergence is below their
    rounding.
    """

    name: str = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ValueError(
                f"divergence: got {self.name!r}, may be one of {', '.join(DIVERGENCES)}"
            )
        if not (_is_number(self.beta) and 0.0 < self.beta < 1.0):
            raise ValueError(
                f"beta: got {self.beta!r}, must lie strictly between 0 and 1 (for a KL ask for "
                "divergence='forward_kl' or 'reverse_kl')"
            )


@dataclass(frozen=True)
class Clip:
    """An upper bound on the divergence.

    - `Clip("token", threshold)` scales a token's loss and gradient by min(1, threshold / D_n), the
      factor detached: no token weighs more than one of divergence `threshold`. The recommended
      one.
    - `Clip("entry", threshold)` bounds each vocabulary entry's term l_nv of the sum from above.
      What OPSD's official code does, here for reproduction. The loss can become negative, and a
      clipped entry no longer draws the student to the teacher while the others still push it away:
      a small threshold inverts the gradient. With m = [l <= threshold]:

          forward_kl   -m T + S sum(m T)
          reverse_kl   S (q - sum S q),  q = m (log S - log T + 1)
          jsd          S (q - sum S q),  q = m (1-b)(log S - log M)

    The threshold is in nats. Raises ValueError for another kind, or a threshold of 0 or less.

    >>> import torch
    >>> from opsd_kernels import linear_divergence
    >>> student, teacher, head = torch.zeros(2, 4), torch.tensor([1.0, 3.0]), torch.eye(5, 4)
    >>> teacher = teacher[:, None].expand(2, 4)
    >>> bounded = linear_divergence(student, teacher, head, clip=Clip("token", 0.1))
    >>> bounded.per_token, bounded.loss, bounded.clipped_fraction
    (tensor([0.0509, 0.1739]), tensor(0.0755), tensor(0.5000))
    """

    kind: str
    threshold: float

    def __post_init__(self) -> None:
        if self.kind not in CLIPS:
            raise ValueError(f"clip: got kind {self.kind!r}, may be one of {', '.join(CLIPS)}")
        if not (isinstance(self.threshold, Real) and self.threshold > 0.0):
            raise ValueError(
                f"clip: got threshold {self.threshold!r}, must be a number greater than 0"
            )


@dataclass(frozen=True)
class LogitTransform:
    """Makes logits of a head's products a = h W^T + bias: scale, then soft cap, then temperature.

    z = softcap(scale * a) / temperature, softcap(x) = c tanh(x / c), or x where `softcap` is None.
    Raises ValueError for a temperature or softcap of 0 or less, or a scale of 0 or infinity.
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    @property
    def slope(self) -> float:
        """The derivative of the logit by the product, without the soft cap's factor."""
        return self.scale / self.temperature

    def __call__(self, product: Any) -> Any:
        """Transform a few products to logits z, in a new tensor."""
        if self.softcap is None:
            return product * (self.scale / self.temperature)
        squashed = (product * (self.scale / self.softcap)).tanh()
        return squashed * (self.softcap / self.temperature)

    def derivative(self, z: Any) -> Any:
        """The derivative of a few logits z by their products."""
        if self.softcap is None:
            return self.slope
        return self.slope * (1.0 - (z * (self.temperature / self.softcap)).square())

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature > 0.0):
            raise ValueError(
                f"temperature: got {self.temperature!r}, must be a finite number greater than 0"
            )
        if not (_is_number(self.scale) and self.scale != 0.0):
            raise ValueError(f"logit_scale: got {self.scale!r}, must be a finite number, not 0")
        if self.softcap is not None and not (_is_number(self.softcap) and self.softcap > 0.0):
            raise ValueError(
                f"logit_softcap: got {self.softcap!r}, must be a finite number greater than 0, "
                "or None"
            )


@dataclass(frozen=True)
class Rule:
    """What is measured between two roles: the divergence, the logits' transform, and the clip.

    teacher_transform: the transform of the teacher's logits; None: the student's.
    """

    divergence: Divergence = field(default_factory=Divergence)  # torch 2.11 compiles no instance
    transform: LogitTransform = field(default_factory=LogitTransform)
    clip: Clip | None = None
    teacher_transform: LogitTransform | None = None

    @property
    def of_teacher(self) -> LogitTransform:
        """The teacher's transform."""
        return self.transform if self.teacher_transform is None else self.teacher_transform

    @property
    def entry_clip(self) -> Clip | None:
        """The clip if it bounds entries, else None."""
        return self.clip if self.clip is not None and self.clip.kind == "entry" else None

    @property
    def token_clip(self) -> Clip | None:
        """The clip if it bounds tokens, else None."""
        return self.clip if self.clip is not None and self.clip.kind == "token" else None
