"""Gates: factors of tokens' weights, computed from the teacher's and the student's predictions.

    loss = Σ_n w_n Π_k g_k(n) D_n,    g = floor + (1 - floor) · raw

No gradient flows through a gate. Δ_n = log T(y_n) - log S(y_n), H_T the teacher's entropy in nats:

    teacher_entropy  exp(-H_T / scale), our form of EGRSD's gate with a floor (arXiv 2605.13255)
    teacher_unsure   1 where H_T > scale, else 0: EOPD's switch (2603.07079)
    gap              1 / (1 + exp(-scale · Δ)): SDAR (2605.15155)
    share            1 + scale · (1 - Σ_{s<n} |Δ_s| / Σ_s |Δ_s|), of a rollout: IW-OPD (2606.22600)
    history          1 + λ_{n-1} g_{n-1}, λ_n = 1 / (1 + exp(scale · (D_n - mean D))), of a rollout:
                     what DASH's A_n = D_n + λ_n A_{n+1} gives each D_n in Σ A_n (2608.06243)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd.common.errors import UserError, in_short
from opsd.config.loss import GateSection
from opsd.grading.rewards import own_function


class Measures(NamedTuple):
    """Measures of a micro-batch's tokens, [N] each, detached; and the length of each rollout.

    log_prob, teacher_log_prob: of the sampled token.
    """

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    log_prob: Tensor
    teacher_log_prob: Tensor
    lengths: Sequence[int]

    @property
    def gap(self) -> Tensor:
        """Δ."""
        return self.teacher_log_prob - self.log_prob


def _share(measures: Measures, scale: float) -> Tensor:
    made = []
    for moved in measures.gap.abs().split(list(measures.lengths)):
        before = moved.cumsum(0) - moved
        made.append(1 + scale * (1 - before / moved.sum().clamp(min=torch.finfo(moved.dtype).tiny)))
    return torch.cat(made)


def _history(measures: Measures, scale: float) -> Tensor:
    made = []
    for d in measures.divergence.cpu().split(list(measures.lengths)):  # one wait for a GPU
        passed_on, gate = (-scale * (d - d.mean())).sigmoid().tolist(), [1.0]
        for share in passed_on[:-1]:
            gate.append(1 + share * gate[-1])
        made.append(d.new_tensor(gate))
    return torch.cat(made).to(measures.divergence.device)


GATES: dict[str, Callable[[Measures, float], Tensor]] = {
    "teacher_entropy": lambda measures, scale: (-measures.teacher_entropy / scale).exp(),
    "teacher_unsure": lambda measures, scale: (measures.teacher_entropy > scale).float(),
    "gap": lambda measures, scale: (scale * measures.gap).sigmoid(),
    "share": _share,
    "history": _history,
}


@torch.no_grad()
def gated(sections: Sequence[GateSection], measures: Measures) -> Tensor:
    """The product of all gates for each token: [N]."""
    product = torch.ones_like(measures.gap)
    for section in sections:
        if section.gate in GATES:
            raw = GATES[section.gate](measures, section.scale)
        else:
            raw = _own(section, measures)
        product *= section.floor + (1 - section.floor) * raw
    return product


def _own(section: GateSection, measures: Measures) -> Tensor:
    """Call the user's function. Raises UserError unless it returns a factor for each token."""
    try:
        raw: Any = own_function(section.gate, "loss.gates")(measures, section.scale)
    except UserError:
        raise
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"loss.gates {section.gate!r} raised {in_short(error)}") from error
    size = list(measures.gap.shape)
    if not isinstance(raw, Tensor) or list(raw.shape) != size:
        raise UserError(f"loss.gates {section.gate!r} must return a tensor of shape {size}")
    if not (raw.isfinite() & (raw >= 0)).all():
        raise UserError(f"loss.gates {section.gate!r} must return finite numbers of at least 0")
    return raw.to(measures.gap)
