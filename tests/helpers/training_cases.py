"""Shared by the tests of training: a tiny random model on disk, worksheets, a short config."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opsd.common.display import Display
from opsd.config.config import Config
from opsd.config.load import merge, parse_config
from opsd.config.sections import PromptsSection
from opsd.data.prompts import Prompts
from opsd.grading.rewards import GradedRollout
from opsd.models.load import load_model
from opsd.quickstart import tiny_model as tiny
from opsd.quickstart.worksheet import worksheet_rows

ROWS = worksheet_rows(16, seed=7)


def make_model(seed: int, tokenizer, **more) -> Qwen3ForCausalLM:
    """An untrained model like the quickstart's tiny one, with half its layers and width: a run
    takes two thirds of the time. Larger weights make both contexts' predictions differ as much.
    """
    config = tiny.make_model(seed, tokenizer, initial_deviation=0.25).config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, **more})
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def write_model(directory: Path, seed: int = 0) -> Path:
    """A tiny random Qwen3 and its character tokenizer, as plain transformers files."""
    tokenizer = tiny.make_tokenizer()
    make_model(seed, tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_wider_model(directory: Path) -> Path:
    """A model of another width with the same vocabulary, which is padded to a round size."""
    torch.manual_seed(5)
    tokenizer = tiny.make_tokenizer()
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64 + 64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(path: Path, rows=ROWS) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(dict(row.columns)) + "\n" for row in rows))
    return path


def short_values(model: Path, data: Path, output: Path) -> dict:
    """The values of a config for a run of a few seconds, in fp32."""
    return {
        "model": {"path": str(model)},
        "data": {"source": str(data)},
        "prompts": {"student": tiny.STUDENT_PROMPT, "teacher": tiny.TEACHER_PROMPT},
        "rollout": {"max_new_tokens": 6},
        "train": {
            "steps": 4,
            "problems_per_step": 3,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "save_every": 2,
        },
        "eval": {"problems": 4, "every": 2, "samples": 2},
        "output": {"dir": str(output)},
    }


def short_config(model: Path, data: Path, output: Path, /, **sections) -> Config:
    """`short_values` with some sections changed."""
    return parse_config(merge(short_values(model, data, output), sections))


def load_student(files: tuple[Path, Path]):
    """The (model, tokenizer) of the fixture `files`."""
    return load_model(short_config(*files, files[0].parent / "none").model)


def changed(files: tuple[Path, Path], seed: int):
    """A model of the same shape with other weights."""
    return make_model(seed, load_student(files)[1]).eval()


def prompts_of(tokenizer, **sections) -> Prompts:
    """Prompts for worksheets in both roles."""
    both = {"student": tiny.STUDENT_PROMPT, "teacher": tiny.TEACHER_PROMPT}
    return Prompts(PromptsSection(**both, **sections), tokenizer)


def quiet() -> Display:
    """A display that shows nothing."""
    return Display(quiet=True)


class RightEvery:
    """Stands in for the grader: each n-th answer is right, so that groups differ."""

    def __init__(self, n: int):
        self.n, self.seen = n, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def grade(self, completions, answers):
        from opsd.grading.grader import Grade

        first, self.seen = self.seen, self.seen + len(completions)
        return [Grade(i % self.n == 0, "", None) for i in range(first, self.seen)]


def graded(problems, rewards):
    """The problems with these rewards, one for each rollout in order; 1 is correct."""
    each = iter(GradedRollout("", True, reward, reward == 1.0) for reward in rewards)
    return [replace(p, outcomes=[next(each) for _ in p.rollouts]) for p in problems]


def with_old(groups, model, moved=None):
    """The groups with the model's own log-probabilities as the old ones, moved by `moved(R)`."""
    return [
        group.of([_with_old(group.student, sample, model, moved) for sample in group.samples])
        for group in groups
    ]


def _with_old(context, sample, model, moved):
    with torch.no_grad():
        own = logits(model, context, sample.rollout).log_softmax(-1)
    old = own[torch.arange(sample.tokens), sample.rollout].float()
    if moved is not None:
        old = old + torch.tensor(moved(sample.tokens))
    return replace(sample, old_log_probs=old.tolist())


def logits(model, context: list[int], rollout: list[int]) -> torch.Tensor:
    """The logits that predict each rollout token, from the plain model on one sequence."""
    ids = torch.tensor([[*context, *rollout]])
    return model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]


def timeless(lines: list[dict]) -> list[dict]:
    """Remove what differs between two equal runs: times, memory, and the check of sharing that each
    process makes at its first step."""

    def varies(key: str) -> bool:
        return "second" in key or key.endswith("_bytes") or key == "sharing_difference"

    return [{k: value for k, value in line.items() if not varies(k)} for line in lines]
