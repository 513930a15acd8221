"""vLLM in the training process, by a stand-in with the documented interface of its `LLM`."""

import sys
import types

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import ROWS, changed, quiet, short_config
from helpers.vllm_outputs import outputs

from opsd.models.load import stop_ids
from opsd.rollout import GenerateSampler, Sampling
from opsd.rollout.vllm_colocated import ColocatedSampler
from opsd.training.run import train


class FakeLLM:
    """vLLM's `LLM` on a CPU: it has weights only while it is awake and after they were given."""

    def __init__(self, model, **settings):
        from transformers import AutoModelForCausalLM

        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.awake = {"weights", "kv_cache"}
        if settings["load_format"] == "dummy":
            self._forget()

    def _forget(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)

    def sleep(self, level):
        assert level == 2 and self.settings["enable_sleep_mode"]
        self.awake = set()
        self._forget()

    def wake_up(self, tags):
        self.awake |= set(tags)

    def reset_prefix_cache(self):
        pass

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights" and "weights" in self.awake
        self.model.load_state_dict(dict(kwargs["weights_iterator"]), strict=False)

    def generate(self, prompts, parameters, use_tqdm):
        assert self.awake == {"weights", "kv_cache"} and not use_tqdm
        return outputs(self.model, prompts, parameters, temperature=0.0)


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, lambda **given: types.SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return module


def test_the_colocated_engine_sleeps_but_while_it_samples(vllm, files, student, contexts):
    engine = ColocatedSampler(
        str(files[0]), stop_ids(*student), trains=True, dtype=torch.float32, memory=0.4
    )
    assert engine.llm.awake == set()
    sampling = Sampling(8, temperature=0)
    for model in (student[0], changed(files, seed=9)):
        engine.sync_weights(model)
        rollouts = engine.sample(contexts, sampling)
        own = GenerateSampler(model, stop_ids(*student)).sample(contexts, sampling)
        assert [(r.ids, r.finished) for r in rollouts] == [(r.ids, r.finished) for r in own]
        assert all(
            len(r.sampling_log_probs) == len(r.ids) and max(r.sampling_log_probs) <= 0
            for r in rollouts
        )
        assert engine.llm.awake == set()
        assert engine.sync["sync_bytes"] == sum(p.nbytes for p in model.parameters())
        again = engine.sample(contexts, sampling)  # dynamic sampling's further problems
        assert [r.ids for r in again] == [r.ids for r in own] and engine.llm.awake == set()


def test_its_start_leaves_torch_as_it_was(vllm, files, student, monkeypatch):
    """The real one seeds this process and gives torch one thread."""
    threads = torch.get_num_threads()

    class Reseeding(FakeLLM):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            torch.manual_seed(0)
            torch.set_num_threads(threads + 1)

    monkeypatch.setattr(vllm, "LLM", Reseeding)
    before = torch.get_rng_state()
    ColocatedSampler(
        str(files[0]), stop_ids(*student), trains=True, dtype=torch.float32, memory=0.4
    )
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_nothing_is_left_to_the_models_generation_config(vllm, files, student):
    """All that vLLM would take from it: get_diff_sampling_param's names, and the two penalties."""
    engine = ColocatedSampler(
        str(files[0]), stop_ids(*student), trains=False, dtype=torch.float32, memory=0.4
    )
    asked = vars(engine._parameters(Sampling(8, temperature=0.7, top_p=0.9, top_k=5), seed=3))
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.7, 0.9, 5)
    assert asked["repetition_penalty"] == 1 and asked["min_p"] == 0 and asked["max_tokens"] == 8
    assert asked["presence_penalty"] == asked["frequency_penalty"] == 0
    assert engine.llm.settings["generation_config"] == "vllm"


def test_training_by_the_colocated_engine(vllm, files, tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.training.run.check_engine", lambda engine: None)  # no GPU here
    config = short_config(*files, tmp_path / "run", rollout={"engine": "vllm", "gpu_memory": 0.3})
    made = []
    monkeypatch.setattr(vllm, "LLM", lambda *a, **k: made.append(FakeLLM(*a, **k)) or made[0])
    train(config, quiet())
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 4
    assert all(abs(line["engine_divergence"]) < 1e-4 for line in metrics)
    settings, prompt = made[0].settings, max(len(row.problem) for row in ROWS) + len("Q:") + 3
    assert settings["gpu_memory_utilization"] == 0.3 and settings["enable_sleep_mode"]
    assert settings["max_model_len"] == prompt + config.rollout.max_new_tokens
    assert read_lines(tmp_path / "run" / "samples.jsonl")[0]["sampling"]["engine"] == "vllm"
