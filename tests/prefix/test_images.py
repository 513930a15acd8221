"""Contexts with images: their prefixes shared, against the plain model's whole forward."""

import pytest
import torch
from helpers.image_models import make_image_model, make_tokenizer, picture, write_processor
from transformers import AutoImageProcessor

from opsd.config.sections import LoraSection, ModelSection
from opsd.data.images import read_images
from opsd.models.images import FAMILIES, ImageReader
from opsd.models.load import checkpoint_activations
from opsd.models.lora import add_adapters
from opsd.models.multimodal import freeze_others
from opsd.prefix import (
    CachedPrefix,
    hidden_states,
    prefix_cache,
    rollout_hidden_states,
    shared_prefix_hidden_states,
    states_by_role,
)

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT = [3, 9, 8, 7, 1, 4]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_processor(tmp_path_factory.mktemp("processor"))


def context(files, model, text, *sizes):
    """`text` with an image of each of these (width, height, seed) at its places."""
    reader = ImageReader(ModelSection(path=str(files)), model.config, make_tokenizer())
    encoded = [picture(*size) for size in sizes]
    made = reader.context(f"<|user|>{text}<|end|><|assistant|>", read_images(encoded, None))
    made.encoded = encoded
    return made


def make_groups(files, model):
    """Two contexts of different images, one with several, and one of text between them."""
    one = context(files, model, f"{IMAGE}1+2=", (40, 20, 1))
    two = context(files, model, f"3{IMAGE}1{IMAGE}12-4=", (16, 16, 2), (24, 40, 3))
    return [
        (one, [[10, 11, 12, 13], [7], [7, 9]]),
        (TEXT, [[8, 9, 10], [11]]),
        (two, [[5, 6, 7, 8, 9, 10], [10, 11]]),
    ]


def plain(model, files, groups):
    """Each rollout in transformers' own forward of the whole conversation: logits [Σ R, V]."""
    pixels, token = AutoImageProcessor.from_pretrained(files), model.config.image_token_id
    logits = []
    for prefix, rollouts in groups:
        images = [read_images(one, None)[0].pixels() for one in getattr(prefix, "encoded", [])]
        for rollout in rollouts:
            ids = torch.tensor([[*prefix, *rollout]])
            more = pixels(images=images, return_tensors="pt") if images else {}
            kinds = {"mm_token_type_ids": (ids == token).long()} if images else {}
            out = model(input_ids=ids, use_cache=False, **more, **kinds)
            logits.append(out.logits[0, len(prefix) - 1 : -1])
    return torch.cat(logits)


def backward(logits, start=0):
    """The gradient of a function of all logits, of which these begin at row `start`."""
    draw = torch.randn(64, logits.shape[1], generator=torch.Generator().manual_seed(9))
    (logits.log_softmax(-1) * draw[start : start + len(logits)]).sum().backward()


def assert_same(model, states, wanted, finish=lambda: None):
    """The issue's bounds: logits within 2e-5, gradients within 1e-5 relative. states: of each
    micro-batch."""
    model.zero_grad()
    head, start, logits = model.get_output_embeddings(), 0, []
    for some in states:
        logits.append(head(some))
        backward(logits[-1], start)
        start += len(some)
    finish()
    assert (torch.cat(logits) - wanted).abs().max() < 2e-5
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    backward(wanted)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys() and not any("visual" in name for name in grads)
    whole = torch.cat([g.flatten() for g in grads.values()]).norm()
    for name, g in grads.items():
        assert (found[name] - g).norm() < 1e-5 * max(g.norm(), 1e-3 * whole), name


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_shared_exactly(family, share, files):
    model = make_image_model(family)
    freeze_others(model)
    groups = make_groups(files, model)
    states = rollout_hidden_states(model, groups, share)
    assert_same(model, [states], plain(model, files, groups))
    other = context(files, model, f"{IMAGE}1+2=", (40, 20, 7))
    seen = shared_prefix_hidden_states(model, [(other, groups[0][1])])
    assert other == groups[0][0]
    assert (
        seen - states[: len(seen)]
    ).abs().max() > 1e-3  # what the image shows makes a difference


@torch.no_grad()
def test_a_model_that_cannot_pack_is_never_blind(files, monkeypatch):
    """The teacher's prefixes are shared by their cache then, but not those with images."""
    model = make_image_model()
    groups = make_groups(files, model)
    monkeypatch.setattr(hidden_states, "unpackable", lambda model: "it attends otherwise")
    logits = model.get_output_embeddings()(rollout_hidden_states(model, groups))
    assert (logits - plain(model, files, groups)).abs().max() < 2e-5


@pytest.mark.parametrize("kind", ["checkpointed", "adapted"])
def test_images_with_checkpoints_and_adapters(kind, files):
    model = make_image_model()
    freeze_others(model)
    if kind == "adapted":
        torch.manual_seed(0)  # of others plain transformers itself is 2e-5 off its fp64
        model = add_adapters(model, ModelSection(path="model", lora=LoraSection(rank=2)), None)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # which begins at 0
                torch.nn.init.normal_(parameter, std=0.1)
    else:
        checkpoint_activations(model.train(), True)
    groups = make_groups(files, model)
    states = rollout_hidden_states(model, groups)
    assert_same(model, [states], plain(model, files, groups))


@pytest.mark.parametrize("trains", [True, False])
def test_a_context_with_images_that_several_micro_batches_share_runs_once(
    trains, files, monkeypatch
):
    monkeypatch.setattr(prefix_cache, "CHUNK", 8)
    model = make_image_model()
    freeze_others(model)
    (prefix, rollouts), *_ = make_groups(files, model)
    calls = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    cached = CachedPrefix(prefix, trains)
    with torch.set_grad_enabled(trains):
        states = [rollout_hidden_states(model, [(cached, [one])]) for one in rollouts]
    assert len(calls) == 1
    wanted = plain(model, files, [(prefix, rollouts)])
    if trains:
        assert_same(model, states, wanted, cached.finish)
    else:
        logits = model.get_output_embeddings()(torch.cat(states))
        assert (logits - wanted).abs().max() < 2e-5


def test_roles_share_the_first_image_and_not_what_stands_between_it_and_the_second(files):
    model = make_image_model()
    freeze_others(model)
    sizes = (16, 16, 1), (24, 16, 2)
    student, teacher = (
        [(context(files, model, f"1{IMAGE}{text}{IMAGE}=", *sizes), [[10, 11], [7, 9, 8]])]
        for text in ("23", "245")
    )
    own, its = states_by_role(model, [student, teacher])
    head = model.get_output_embeddings()
    assert (head(its) - plain(model, files, teacher)).abs().max() < 2e-5
    assert (head(own) - plain(model, files, student)).abs().max() < 2e-5


def test_roles_share_the_start_in_which_their_images_are_the_same(files):
    model = make_image_model()
    freeze_others(model)
    rollouts = [[10, 11, 12], [7, 9]]

    def made(text, seed):
        return context(files, model, text, (16, 16, seed)), rollouts

    student = [made(f"1{IMAGE}2=", 1), made(f"12{IMAGE}2=", 1), (TEXT, rollouts)]
    # The same image, then another text; another image under the same ids; no image at all.
    teacher = [made(f"1{IMAGE}2-3=", 1), made(f"12{IMAGE}2=3", 5), ([*TEXT[:3], 5, 6], rollouts)]
    seen = []
    embed = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].shape[-1]), with_kwargs=True
    )
    own, its = states_by_role(model, [student, teacher])
    embed.remove()
    assert its.grad_fn is None
    head = model.get_output_embeddings()
    assert (head(its) - plain(model, files, teacher)).abs().max() < 2e-5
    assert_same(model, [own], plain(model, files, student))
    every = sum(len(prefix) for prefix, _ in teacher) + 3 * sum(len(r) - 1 for r in rollouts)
    first, second = student[0][0], student[1][0]
    common = [first.index(first.reader.token_id) + 4 + 2, second.index(second.reader.token_id), 3]
    assert seen[-1] == every - sum(common)
