"""What a step holds: it grows with a micro-batch's tokens, not with the group's or its logits."""

import copy
import weakref

import torch
from helpers.prefix_models import make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsd.config.loss import LossSection
from opsd.objectives import OPSD, Sample, SampleGroup, Totals
from opsd.prefix import CachedPrefix, continued, hidden_states, prefix_cache
from opsd.prefix.prefix_cache import uncached
from opsd.training.step import OPSDStep

VOCABULARY, PREFIX, ROLLOUT = 8192, 48, 64
LOSS_BUDGET = 1 << 20


class LiveBytes(TorchDispatchMode):
    """The bytes of the tensors that are made inside and alive, and the most of them."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self._seen.discard(key)
        self.live -= size


def sample_groups(rollouts):
    draw = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()

    student, teacher = ids(PREFIX), ids(2 * PREFIX)
    return [SampleGroup(student, [Sample(ids(ROLLOUT), 1e-3) for _ in range(rollouts)], [teacher])]


def peak(rollouts, budget):
    """The most that one step holds beside weights and gradients."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "num_hidden_layers": 4}
    model = make("Llama", sizes)
    section = LossSection(memory_budget=LOSS_BUDGET, backend="torch")
    step = OPSDStep(model, OPSD(section, model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batches = step.micro_batches(sample_groups(rollouts), budget)
    batches, cache = step.cache_prefixes(batches, budget)
    with LiveBytes() as memory:
        for batch in batches:
            step(batch, Totals()).backward()
            cache.batch_done()
    return memory.peak, len(batches)


def test_memory_is_of_a_micro_batch():
    few, parts = peak(rollouts=4, budget=256)
    many, more = peak(rollouts=16, budget=256)
    assert more >= 4 * parts - 1
    assert many < 1.05 * few
    # All logits of both roles would be ten times what is held.
    logits = 2 * 16 * ROLLOUT * VOCABULARY * 4
    assert many < logits / 10
    wide, parts = peak(rollouts=16, budget=4096)
    assert parts == 1 and wide > 2 * many


def teacher_peak(context, chunk, monkeypatch):
    """The most that a step holds with a teacher's context this long, and a layer's cache of it."""
    for module in (continued, hidden_states, prefix_cache):
        monkeypatch.setattr(module, "CHUNK", chunk)
    model = make("Llama", {"max_position_embeddings": 8192})
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (context + 80,), generator=draw).tolist()
    samples = [Sample(ids[n : n + 20], 1e-3) for n in (0, 20)]
    group = SampleGroup(ids[40:60], samples, [ids[80:]])
    step = OPSDStep(model, OPSD(LossSection(backend="torch"), copy.deepcopy(model)))
    with LiveBytes() as memory:
        step([group], Totals()).backward()
    config = model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return memory.peak, 2 * 4 * width * context


def test_a_teacher_s_long_context_needs_memory_for_its_cache_alone(monkeypatch):
    short, its = teacher_peak(1024, 512, monkeypatch)
    long, cache = teacher_peak(8192 - 64, 512, monkeypatch)
    # The cache of both layers, and the one that runs holds its own three times more.
    assert long <= 1.1 * short + 5 * (cache - its), (long, short, cache)


def test_a_cached_prefix_is_in_memory_once():
    model = make("Llama", {"max_position_embeddings": 512})
    # As a list, a tensor's numbers would be tensors, of some hundred bytes each.
    ids = torch.randint(3, 60, (400,))
    prefix = CachedPrefix(ids, trains=False)
    assert prefix.ids is ids
    rollouts = [torch.arange(3, 8)]
    with torch.no_grad():
        cache = prefix.keys_and_values(model)
        with LiveBytes() as memory:
            _, _, past = uncached(model, [(prefix, rollouts)], [(ids, rollouts)])
    assert past == [cache] and memory.peak <= ids.nbytes


def test_the_meter_counts_what_is_alive():
    with LiveBytes() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        del b
        a += 1
        assert memory.live == 4000
    assert memory.peak == 8000
