"""Write the table of exactness by architecture into docs/exactness.md.

python tests/helpers/exactness.py
"""

import re
import warnings
from pathlib import Path

import torch
import transformers

from helpers.prefix_models import MODELS, alone, gradient, make, make_groups
from opsd.prefix import shared_prefix_hidden_states, unpackable

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "exactness.md"

FURTHER = {
    name.lower(): (name, {"head_dim": 8, "dropout": 0.0})
    for name in """Gemma Phi Phi3 Olmo Olmo2 Olmo3 Starcoder2 Cohere Cohere2 Granite GraniteMoe Glm
    Glm4 Glm4Moe SmolLM3 Ministral Ministral3 Exaone4 Ernie4_5 Ernie4_5_Moe Nemotron Olmoe Qwen2Moe
    HunYuanDenseV1 MiniMaxM2 Apertus Arcee Helium NanoChat OPT GPTNeoX""".split()
}
"""Models with their default windows, soft caps and experts."""


def measure(name: str, sizes: dict) -> tuple[float, float]:
    """The largest difference of logits, and of gradients relative to their norms."""
    found = []
    for checkpointing in (False, True):
        model = make(name, sizes).train()
        assert unpackable(model) is None, unpackable(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        groups = make_groups()
        states = shared_prefix_hidden_states(model, groups)
        shared = gradient(model, states)
        model.gradient_checkpointing_disable()
        separate = alone(model, groups)
        wanted = gradient(model, separate)
        head = model.get_output_embeddings()
        whole = torch.cat([g.flatten() for g in wanted.values()]).norm()
        errors = [
            (shared[key] - g).norm() / max(g.norm(), 1e-3 * whole) for key, g in wanted.items()
        ]
        found.append([(head(states) - head(separate)).abs().max(), max(errors)])
    return torch.tensor(found).amax(0).tolist()


def table() -> str:
    """The table, in Markdown."""
    lines = [
        "| | heads / key heads | head | logits | gradients |",
        "| --- | --- | --- | --- | --- |",
    ]
    for title, (name, sizes) in {**MODELS, **FURTHER}.items():
        config = make(name, sizes).get_decoder().config
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        tied = "tied" if config.tie_word_embeddings else "own"
        figures = " | ".join(f"{x:.1e}" for x in measure(name, sizes))
        lines.append(f"| {title} | {heads} / {key_heads} | {tied} | {figures} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    text = DOCUMENT.read_text()
    marked = r"(<!-- exactness -->\n).*?(<!-- end -->)"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, fp32, CPU"
    new = rf"\g<1>\n{table()}\n\n({versions})\n\n\g<2>"
    assert re.search(marked, text, re.S)
    DOCUMENT.write_text(re.sub(marked, new, text, flags=re.S))


if __name__ == "__main__":
    main()
