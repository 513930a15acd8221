"""The kernels of packed attention: each like `tiles`, and the choice among them.

Without a GPU, flash attention's calls are dense stand-ins with its arguments and conventions, so
that which rows and keys go into which call, the merge and its backward are all tested here.
"""

import sys

import pytest
import torch
import yaml
from helpers.prefix_cases import flash_attn_operators, install_flash_attn, register_torch_flash
from helpers.prefix_models import MODELS, assert_same, make, make_groups
from helpers.training_cases import short_values, write_rows
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.prefix import attention, flex, shared_prefix_hidden_states, try_kernel
from opsd.prefix.attention import Inputs, choose, kernel_for, missing, obstacle, use_kernel
from opsd.prefix.layout import Layout, Scores
from opsd.prefix.tiled import tiled_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WINDOWS = [None, 1, 4, 9, 1000]


def layouts():
    """Streams with all that can go wrong: R = 1 alone in a group, no past or one, P = 1."""
    groups = make_groups()
    return {
        "plain": Layout(groups, CPU),
        "past": Layout(groups, CPU, [5, 3, 2, 20]),
        "past of some": Layout(groups, CPU, [0, 3, 0, 20]),
        "past but no rollout": Layout(groups[2:3], CPU, [4]),
        "one prefix, nothing else": Layout(groups[2:3], CPU),
        "a token at most": Layout([([5], [[6, 7]]), ([5, 6], [[7]]), ([8], [[9, 3]])], CPU),
    }


LAYOUTS = layouts()


def tensors(layout, heads=4, key_heads=2, width=8, dtype=torch.float64):
    draw = torch.Generator().manual_seed(3)
    rows = layout.past + len(layout.ids)
    shapes = (len(layout.ids), heads, width), (rows, key_heads, width), (rows, key_heads, width)
    return [torch.randn(shape, generator=draw, dtype=dtype, requires_grad=True) for shape in shapes]


def results(attend, layout, window, softcap):
    query, key, value = tensors(layout)
    out = attend(query, key, value, layout, Scores(0.4, window, softcap))
    seed = torch.Generator().manual_seed(4)
    d_out = torch.randn(out.shape, generator=seed, dtype=out.dtype)
    return out, *torch.autograd.grad(out, (query, key, value), d_out)


@pytest.fixture(scope="module")
def torch_flash():
    library = register_torch_flash()
    yield
    library._destroy()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_merged_parts_are_the_whole_softmax(name, window, torch_flash):
    layout = LAYOUTS[name]
    found = results(attention.KERNELS["flash"], layout, window, None)
    wanted = results(tiled_attention, layout, window, None)
    for x, y in zip(found, wanted, strict=True):
        # The log-sum-exp is fp32, as flash attention's is.
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_the_package_caps_scores(window, monkeypatch):
    install_flash_attn(monkeypatch)
    for layout in (LAYOUTS["plain"], LAYOUTS["past of some"]):
        found = results(attention.KERNELS["flash_attn"], layout, window, 1.5)
        wanted = results(tiled_attention, layout, window, 1.5)
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3", "mistral, window", "gemma 2, soft caps"])
def test_models_attend_by_flash_attention(name, torch_flash, monkeypatch):
    install_flash_attn(monkeypatch)
    kernel = "flash_attn" if "caps" in name else "flash"
    monkeypatch.setattr(attention, "choose", lambda asked, inputs: kernel)
    use_kernel("auto")  # forgets what was chosen before
    model = make(*MODELS[name])
    groups = make_groups()
    assert_same(model, shared_prefix_hidden_states(model, groups), groups)
    assert try_kernel(model, torch.float32, CPU) == kernel
    assert set(attention._chosen.values()) == {kernel}
    use_kernel("auto")


def brute_force(layout, window):
    """[T, N]: each query sees what its segment's spans say, by position."""
    mask = torch.zeros(len(layout.ids), layout.past + len(layout.ids), dtype=torch.bool)
    for segment in layout.segments:
        for i in range(segment.queries.length):
            at = segment.queries.position + i
            for span in (*segment.before, layout.key_rows(segment.queries)):
                for j in range(span.length):
                    distance = at - span.position - j
                    mask[segment.queries.start + i, span.start + j] = distance >= 0 and (
                        window is None or distance < window
                    )
    return mask


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mask_of_flex_attention(name, window):
    layout = LAYOUTS[name]
    rows = torch.arange(len(layout.ids))[:, None]
    keys = torch.arange(layout.past + len(layout.ids))[None]
    found = flex.visible(layout, window)(None, None, rows, keys)
    assert found.equal(brute_force(layout, window))


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("window", [None, 100])
def test_the_blocks_of_flex_attention(window):
    """They are torch's own, which makes them from a mask of all rows and keys."""
    ids = list(range(300))
    layout = Layout([(ids, [ids, ids[:70]]), (ids[:10], [ids[:5]])], CPU, [140, 20])
    tokens, keys = len(layout.ids), layout.past + len(layout.ids)
    sees = flex.visible(layout, window)
    wanted = create_block_mask(sees, None, None, tokens, keys, device="cpu")
    with Largest() as largest:
        found = flex.block_mask(layout, window)
    assert largest.elements <= 128 * (keys + 128) < tokens * keys / 4
    assert found.shape == wanted.shape and found.BLOCK_SIZE == wanted.BLOCK_SIZE
    assert found.to_dense().equal(wanted.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        for name in (f"{kind}_num_blocks", f"{kind}_indices"):
            x, y = getattr(found, name), getattr(wanted, name)
            assert x.dtype == y.dtype and x.equal(y), name


# Uncompiled, as a CPU runs it here, it says that it is slow.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_forward(window, softcap):
    layout = LAYOUTS["past of some"]
    query, key, value = (x.detach() for x in tensors(layout, width=16))
    scores = Scores(0.4, window, softcap)
    wanted = tiled_attention(query, key, value[..., :12].contiguous(), layout, scores)
    found = flex.flex_packed_attention(query, key, value[..., :12], layout, scores)
    torch.testing.assert_close(found, wanted)


def on_gpu(**more):
    return Inputs(
        **{
            "device": CUDA,
            "dtype": torch.bfloat16,
            "head_width": 128,
            "value_width": 128,
            "softcap": False,
            **more,
        }
    )


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as the choice asks; `absent` holds what is not installed."""
    absent = {"flash_3": "not here"}
    monkeypatch.setattr(attention, "missing", lambda name, device: absent.get(name))
    return absent


def test_auto_takes_the_fastest_that_can(gpu):
    assert choose("auto", on_gpu()) == "flash"
    assert choose("auto", on_gpu(softcap=True)) == "flash_attn"
    assert choose("auto", on_gpu(value_width=64)) == "flex"
    assert choose("auto", on_gpu(head_width=320, value_width=320)) == "flex"
    assert choose("auto", on_gpu(dtype=torch.float32)) == "tiles"
    gpu["flash_attn"] = "not here"
    assert choose("auto", on_gpu(softcap=True)) == "flex"
    gpu["flex"] = "not here"
    assert choose("auto", on_gpu(softcap=True)) == "tiles"


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("flash", {"dtype": torch.float32}, "bf16 or fp16, not in float32"),
        ("flash", {"softcap": True}, "caps its attention scores"),
        ("flash", {"value_width": 64}, "keys are 128 wide and its values 64"),
        ("flash_attn", {"head_width": 20, "value_width": 20}, "20 wide"),
        ("flash_3", {}, "not here"),
    ],
)
def test_what_was_asked_for_and_cannot_is_an_error(gpu, name, more, reason):
    with pytest.raises(UserError, match=rf"train\.prefix_kernel is '{name}': .*{reason}.*'auto'"):
        choose(name, on_gpu(**more))


def test_a_model_is_tried_for_where_it_will_run(gpu, monkeypatch):
    """It may still be on the CPU, as before FSDP2 shards it; nothing runs by what was asked for."""
    model = make(*MODELS["gemma 2, soft caps"])
    assert try_kernel(model, torch.bfloat16, CUDA) == "flash_attn"
    assert try_kernel(model, torch.float32, CUDA) == "tiles"
    use_kernel("flash")
    with pytest.raises(UserError, match="caps its attention scores"):
        try_kernel(model, torch.bfloat16, CUDA)
    assert try_kernel(make("Qwen3", {"head_dim": 16}), torch.bfloat16, CUDA) == "flash"
    use_kernel("auto")


def test_a_run_refuses_a_kernel_before_it_does_anything(tmp_path, capsys):
    if torch.cuda.is_available():
        return
    (tmp_path / "no weights").mkdir()
    (tmp_path / "no weights" / "config.json").write_text("{}")
    rows = write_rows(tmp_path / "rows.jsonl")
    values = short_values(tmp_path / "no weights", rows, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path), "train.prefix_kernel=flash"]) != 0
    assert "train.prefix_kernel is 'flash': it needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_on_a_cpu_there_are_tiles_and_an_error_for_all_others():
    inputs = on_gpu(device=CPU)
    assert choose("auto", inputs) == "tiles" == choose("tiles", inputs)
    for name in attention.KERNELS.keys() - {"tiles"}:
        assert "needs a GPU" in obstacle(name, inputs)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"train\.prefix_kernel is 'flex': it needs a GPU"):
            use_kernel("flex")
    with pytest.raises(UserError, match=r"'fast': it may be auto, tiles, flash"):
        use_kernel("fast")


def test_what_a_machine_lacks_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    missing.cache_clear()
    assert "older than compute capability 8.0" in missing("flash", CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    missing.cache_clear()
    assert missing("flash", CUDA) is None
    assert missing("flash_3", CUDA) == "FlashAttention 3 is for Hopper, not for A GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    missing.cache_clear()
    assert "flash_attn_interface" in missing("flash_3", CUDA)
    assert "flash-attn is not installed" in missing("flash_attn", CUDA)
    missing.cache_clear()


def test_a_package_of_another_version_is_refused(monkeypatch):
    install_flash_attn(monkeypatch)
    assert attention._unsuitable_flash_attn() is None
    interface = sys.modules["flash_attn.flash_attn_interface"]
    forward, _ = flash_attn_operators()
    for other in (lambda dout, q, k, v: None, forward):
        interface._flash_attn_varlen_backward = other
        assert "2.7 to 2.8" in attention._unsuitable_flash_attn()


def test_the_choice_is_made_once_for_tensors_alike(monkeypatch):
    asked = []
    real = attention.choose
    monkeypatch.setattr(attention, "choose", lambda *a: asked.append(a) or real(*a))
    use_kernel("tiles")
    query, _, value = tensors(LAYOUTS["plain"])
    for _ in range(3):
        assert kernel_for(query, value, Scores(1.0)) is tiled_attention
    assert len(asked) == 1
    use_kernel("auto")
    kernel_for(query, value, Scores(1.0))
    assert len(asked) == 2
