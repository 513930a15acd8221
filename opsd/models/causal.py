"""Checks that a model can be trained here: it must be causal, and its logits one matrix product.

Both are tested by running a few tokens, since class names do not tell: BERT's class for causal
language modelling is causal only with `is_decoder` in its config.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.errors import UserError, in_short
from opsd.models.head import decoder_of, embedding_rows, head, head_arguments, logits_of

TOKENS = 12
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
"""The largest error by rounding, relative to the largest value; in 16 bits it is `HALF`."""
HALF = 0.05


@torch.no_grad()
def check_causal(model: PreTrainedModel, where: str) -> None:
    """Raise UserError unless a token's state does not depend on later tokens, and the logits equal
    those that `opsd.models.head` computes from the states."""
    name, training, device = type(model).__name__, model.training, model.device.type
    flash = "flash" in str(model.config._attn_implementation)  # computes in 16 bits only
    if flash and device == "cpu":
        return
    model.eval()
    try:
        with torch.autocast(device, torch.bfloat16, enabled=flash), torch.random.fork_rng():
            states, logits, ours = _tried(model)
            decoder_of(model.train())(input_ids=torch.arange(3, device=model.device)[None])
    except Exception as error:  # the model's own code may raise anything
        raise UserError(
            f"{where}: {name} does not run on tokens alone ({in_short(error)}); take a causal "
            "language model of text"
        ) from error
    finally:
        model.train(training)
    tolerance = HALF if flash else ROUNDING.get(model.dtype, HALF)
    moved = (states[0] - states[1]).abs()
    half = TOKENS // 2
    if moved[:half].max() > tolerance * moved[half:].max():
        raise UserError(
            f"{where}: in {name} a token sees those that follow it, so that it predicts nothing; "
            "take a causal model (of BERT's kind: one with is_decoder: true in its config.json)"
        )
    alike = logits.shape == ours.shape
    if not (alike and (logits - ours).abs().max() <= tolerance * logits.abs().max()):
        raise UserError(
            f"{where}: {name} makes its logits otherwise than by one product of hidden states and "
            "head, with a scale and a soft cap; take another model"
        )


def _tried(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Run two rows that differ in their second half. Returns the states [2, T, D], the model's
    logits [2 T, V], and the logits that we compute."""
    ids = torch.arange(3, 3 + TOKENS, device=model.device).repeat(2, 1)
    ids[1, TOKENS // 2 :] += TOKENS
    seen: list[Tensor] = []
    hook = decoder_of(model).register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state)
    )
    try:
        logits = model(input_ids=ids % embedding_rows(model), use_cache=False).logits
    finally:
        hook.remove()
    (states,) = seen
    weight, bias = head(model)
    ours = logits_of(states.flatten(0, 1), weight, bias, **head_arguments(model))
    return states.float(), logits.float().flatten(0, 1), ours
