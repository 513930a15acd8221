"""Chat templates by engines by methods: what is learnt from is what transformers renders.

For each family of templates a tiny model samples by each engine, and each method scores what came
of it. The ids of both contexts, of targets, the stops and the loss are held against the chat that
transformers' apply_chat_template renders and against dense logits of these ids.
"""

import pytest
import torch
from helpers import dense_rendering as dense
from helpers.chat_templates import ANSWER, FAMILIES
from helpers.chat_tokenizers import make_tokenizer
from helpers.training_cases import graded, logits
from helpers.vllm_outputs import colocated
from transformers import LlamaConfig, LlamaForCausalLM

from opsd.config.load import parse_config
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.models.load import stop_ids
from opsd.objectives import Problem, Totals, make_objective
from opsd.objectives.grpo import group_advantages
from opsd.rollout import ContinuousSampler, GenerateSampler, Sampling
from opsd.training.step import OPSDStep

ENGINES = ["generate", "continuous", "vllm"]
METHODS = ["opsd", "grpo", "sft", "distill"]
ROW = Row("What is 1 + 2?", ANSWER, "3", {})
STUDENT, TEACHER = "{{ problem }} Box it.", "{{ problem }}\n\nSolved: {{ solution }}\n\nBox it."
SAMPLING = Sampling(5)


def test_the_matrix_is_large():
    assert len(FAMILIES) * len(ENGINES) * len(METHODS) >= 300


def make_model(tokenizer, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, max_position_embeddings=1024)
    )
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    return model.eval()


def sampler_of(engine, model, stops):
    if engine == "generate":
        return GenerateSampler(model, stops)
    if engine == "continuous":
        return ContinuousSampler(model, stops)
    return colocated(model, stops)


def direct(tokenizer, family, message, answer=None):
    """The text and the ids that transformers renders."""
    parts = family.name == "lists of parts"

    def said(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}

    chat = [said("user", message), *([] if answer is None else [said("assistant", answer)])]
    asked = {"add_generation_prompt": answer is None, **family.arguments}
    text = tokenizer.apply_chat_template(chat, tokenize=False, **asked)
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **asked)
    return text, ids


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_engine_and_method_sees_what_the_template_writes(family, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # half of `continuous`'s time
    tokenizer = make_tokenizer(family)
    model, other = make_model(tokenizer, 0), make_model(tokenizer, 1)
    prompts = Prompts(config_of("opsd").prompts, tokenizer)
    text, student = direct(tokenizer, family, "What is 1 + 2? Box it.")
    _, teacher = direct(tokenizer, family, f"What is 1 + 2?\n\nSolved: {ANSWER}\n\nBox it.")
    prompts = Prompts(prompts.section.model_copy(update=chat_arguments(family)), tokenizer)
    stops = stop_ids(model, tokenizer)
    turn = family.stop or family.eos
    assert stops == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(turn)}

    target = prompts.target(ROW)
    wanted = family.before.removeprefix(family.given) + ANSWER + (family.end or family.eos)
    whole, whole_ids = direct(tokenizer, family, "What is 1 + 2? Box it.", ANSWER)
    decoded = tokenizer.decode([*student, *target])
    assert decoded == tokenizer.decode(student) + wanted
    if whole.startswith(text) and family.stop:
        assert whole_ids[: len(student) + len(target)] == [*student, *target]

    for engine in ENGINES:
        torch.manual_seed(7)
        rollouts = sampler_of(engine, model, stops).sample([student] * 2, SAMPLING)
        for rollout in rollouts:
            assert not stops & set(rollout.ids[:-1])
            assert rollout.finished == (rollout.ids[-1] in stops)
        problem = Problem(ROW, prompts.context(ROW), rollouts)
        assert problem.context.student == student and problem.context.teacher == teacher
        (problem,) = graded([problem], [1.0, 0.0])
        for method in METHODS:
            config = config_of(method)
            objective = make_objective(method, config.loss, other, prompts, SAMPLING)
            groups, _ = objective.sample_groups([problem])
            found = OPSDStep(model, objective)(groups, Totals())
            expected = dense_loss(method, config.loss, model, other, student, teacher, rollouts,
                                  target)  # fmt: skip
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)


def chat_arguments(family):
    return {"student_chat": family.arguments, "teacher_chat": family.arguments}


def config_of(method):
    teacher = {"policy": "model", "path": "other"} if method == "distill" else {}
    loss = {"divergence": "reverse_kl"} if method in ("opsd", "distill") else {}
    return parse_config(
        {
            "method": method,
            "model": {"path": "none"},
            "data": {"source": "none"},
            "prompts": {"student": STUDENT, "teacher": TEACHER},
            "teacher": teacher,
            "rollout": {} if method == "sft" else {"group_size": 2, "max_new_tokens": 5},
            "loss": {**loss, "aggregation": "token"},
            "eval": {"problems": 0},
        }
    )


def dense_loss(method, loss, model, other, student, teacher, rollouts, target):
    """Of the step, from the ids that transformers rendered."""
    if method == "sft":
        return -dense.log_p(logits(model, student, target), torch.tensor(target)).mean()
    losses = []
    advantages = group_advantages([1.0, 0.0], loss.scale_advantages)
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        own = logits(model, student, rollout.ids)
        if method == "grpo":
            ids, a = torch.tensor(rollout.ids), torch.tensor(advantage)
            losses.append(dense.policy_gradient(own, ids, a, None, loss.epsilon, loss.epsilon))
            continue
        with torch.no_grad():
            taught = logits(other, student if method == "distill" else teacher, rollout.ids)
        losses.append(dense.divergence(own, taught, "reverse_kl", 0.5, None))
    return dense.step(losses, [torch.ones(len(x)) for x in losses], "token", 5)
