"""Rollouts are drawn from the model's own distribution under the config alone, by every engine.

The model ships a generation_config.json that would draw otherwise in every way.
"""

import json
from dataclasses import replace

import pytest
import torch
from helpers import dense_rendering as dense
from helpers.training_cases import graded, logits, write_model
from helpers.vllm_outputs import colocated
from helpers.vllm_server import FakeVLLM

from opsd.config.load import parse_config
from opsd.config.sections import ModelSection, PromptsSection
from opsd.data.prompts import Context, Prompts
from opsd.data.rows import Row
from opsd.models.load import load_model, load_tokenizer, stop_ids
from opsd.objectives import Problem, Totals, make_objective
from opsd.objectives.log_probs import rollout_log_prob
from opsd.rollout import SAMPLERS, Sampling
from opsd.rollout.base import cut
from opsd.rollout.vllm_client import VLLMServer
from opsd.rollout.vllm_server import ServerSampler
from opsd.training.step import OPSDStep

SHIPPED = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.4,
    "min_p": 0.2,
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "min_new_tokens": 2,
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[8]],
    "forced_eos_token_id": 9,
    "sequence_bias": [[[10], 4.0]],
    "max_time": 0.001,
    "max_new_tokens": 1,
    "renormalize_logits": True,
}
CONTEXT = [5, 9, 11, 6]
ENGINES = [*SAMPLERS, "vllm", "vllm_server"]
WAYS = {
    "plain": Sampling(2, batch_size=500),
    "cut": Sampling(2, temperature=1.4, top_p=0.95, top_k=12, batch_size=500),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("ships") / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **SHIPPED}))
    return path


def loaded(path, obeys=False):
    """obeys: as transformers loads it, its generation config in place."""
    model, tokenizer = load_model(ModelSection(path=str(path)))
    if obeys:
        model.generation_config = model.shipped_generation_config
    return model, stop_ids(model, tokenizer)


def next_token(model, ids, sampling):
    """The dense distribution, in fp64."""
    with torch.no_grad():
        z = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    return left(z / sampling.temperature, sampling).softmax(-1)


def left(z, sampling):
    """The logits that top-k and top-p leave, -inf elsewhere."""
    order = z.argsort(descending=True)
    kept = torch.ones_like(z, dtype=torch.bool)
    if sampling.top_k:
        kept[order[sampling.top_k :]] = False
    if sampling.top_p < 1:
        p = z.masked_fill(~kept, -torch.inf).softmax(-1)[order]
        kept[order[p.cumsum(-1) - p >= sampling.top_p]] = False
    return z.masked_fill(~kept, -torch.inf)


def deviation(rollouts, model, stops, sampling):
    """How far pairs of tokens are from the model's own, in standard deviations of chi squared."""
    first, wanted = next_token(model, CONTEXT, sampling), {}
    for a, p in enumerate(first.tolist()):
        if a in stops:
            wanted[(a,)] = p
        elif p > 0:
            second = next_token(model, [*CONTEXT, a], sampling).tolist()
            wanted |= {(a, b): p * q for b, q in enumerate(second)}
    found = dict.fromkeys(wanted, 0)
    for rollout in rollouts:
        found[tuple(rollout.ids)] += 1  # KeyError: a pair that cannot be drawn
    n, cells, rest = len(rollouts), [], [0.0, 0.0]
    for pair, p in wanted.items():
        if n * p >= 5:
            cells.append((found[pair], n * p))
        else:
            rest = [rest[0] + found[pair], rest[1] + n * p]
    cells += [tuple(rest)] if rest[1] >= 5 else []
    squares = sum((f - w) ** 2 / w for f, w in cells)
    freedom = len(cells) - 1
    assert freedom >= 5
    return (squares - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", [*SAMPLERS, "vllm_server"])
def test_pairs_of_tokens_are_drawn_as_the_model_says(engine, way, path, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    model, stops = loaded(path, obeys=engine in SAMPLERS)
    torch.manual_seed(0)
    sampling, count = WAYS[way], 1200
    if engine in SAMPLERS:
        rollouts = SAMPLERS[engine](model, stops).sample([CONTEXT] * count, sampling)
        assert model.generation_config is model.shipped_generation_config
    else:
        server = FakeVLLM(path)
        server.model, count = model, 600
        sampler = ServerSampler(VLLMServer(server.address, timeout=20.0, patience=5.0), stops)
        rollouts = sampler.sample([CONTEXT] * count, sampling)
        server.stop()
    assert len(rollouts) == count and deviation(rollouts, model, stops, sampling) < 4


def drawn_logits(model, ids, sampling):
    """[R, V]: of what each token of a rollout was drawn from; a token that another model's cut
    leaves out counts as left."""
    z = logits(model, CONTEXT, ids) / sampling.temperature
    rows = [left(row.detach().double(), sampling).isfinite() for row in z]
    kept = torch.stack(rows).scatter(1, torch.tensor(ids)[:, None], True)
    return z.masked_fill(~kept, -torch.inf)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["grpo", "opsd", "distill"])
def test_what_is_scored_is_what_was_drawn(method, engine, way, path, monkeypatch):
    """The policy gradient is that of the distribution above, to which the draws are held, and the
    old log-probabilities are of it, though student and teacher have dropout in training."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    model, stops = loaded(path)
    other = loaded(path)[0]
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(0.7)
    torch.manual_seed(1)
    sampling = replace(WAYS[way], max_new_tokens=5)
    if engine in SAMPLERS:
        sampler = SAMPLERS[engine](model, stops)
    elif engine == "vllm":
        sampler = colocated(model, stops)
    else:
        server = FakeVLLM(path)
        server.model.load_state_dict(model.state_dict())
        sampler = ServerSampler(VLLMServer(server.address, timeout=20.0, patience=5.0), stops)
    rollouts = sampler.sample([CONTEXT] * 4, sampling)
    for module in (*model.modules(), *other.train().modules()):
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    values = {"method": method, "model": {"path": "-"}, "data": {"source": "-"}}
    values["loss"] = {} if method == "grpo" else {"divergence": "sampled_token"}
    if method == "distill":
        values["teacher"] = {"policy": "model", "path": "-"}
    loss = parse_config({**values, "rollout": {"group_size": 4, "max_new_tokens": 5}}).loss
    prompts = Prompts(PromptsSection(), load_tokenizer(ModelSection(path=str(path))))
    objective = make_objective(method, loss, other, prompts, sampling)
    problem = Problem(Row("?", "", "", {}), Context(CONTEXT, CONTEXT), rollouts)
    (problem,) = graded([problem], [1.0, 0.0, 0.0, 1.0])
    groups, _ = objective.sample_groups([problem])
    if method == "grpo":
        old = rollout_log_prob(model.train(), groups, loss, True, sampling)
        wanted = [dense.log_p(drawn_logits(model.eval(), r.ids, sampling), torch.tensor(r.ids))
                  for r in rollouts]  # fmt: skip
        torch.testing.assert_close(old, torch.cat(wanted).float(), rtol=1e-4, atol=1e-5)
    OPSDStep(model.train(), objective)(groups, Totals()).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    losses = []
    for rollout, advantage in zip(rollouts, [1.0, -1.0, -1.0, 1.0], strict=True):
        ids, own = torch.tensor(rollout.ids), drawn_logits(model, rollout.ids, sampling)
        if method == "grpo":
            losses.append(-advantage * dense.log_p(own, ids))
        else:
            with torch.no_grad():
                its = drawn_logits(other, rollout.ids, sampling)
            losses.append(dense.sampled_token(own, its, ids, low=9.0, high=9.0))
    dense.step(losses, [torch.ones(len(each)) for each in losses], loss.aggregation, 5).backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("engine", SAMPLERS)
def test_greedy_rollouts_are_the_models_likeliest_tokens(engine, path):
    model, stops = loaded(path, obeys=True)
    (rollout,) = SAMPLERS[engine](model, stops).sample([CONTEXT], Sampling(6, temperature=0))
    ids = list(CONTEXT)
    for token in rollout.ids:
        assert token == int(next_token(model, ids, Sampling(1)).argmax())
        ids.append(token)
    assert len(rollout.ids) == 6 or rollout.ids[-1] in stops


def test_the_test_would_see_it(path):
    """Plain `generate` obeys what is shipped, and is far from the model."""
    model, stops = loaded(path, obeys=True)
    penalty = {"repetition_penalty": 1.8, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    model.generation_config = type(model.generation_config)(**penalty, do_sample=True)
    torch.manual_seed(0)
    context = torch.tensor([CONTEXT] * 2000)
    written = model.generate(context, max_new_tokens=2, eos_token_id=sorted(stops), pad_token_id=2)
    rollouts = [cut(row, stops) for row in written[:, len(CONTEXT) :].tolist()]
    assert deviation(rollouts, model, stops, Sampling(2)) > 20
