"""What `train.precision: auto` stands for, and that a run keeps it."""

import time

import pytest
import torch
from helpers.training_cases import short_config

from opsd.common import precision
from opsd.config.load import save_config
from opsd.runs.directory import settle
from opsd_kernels.gemm import _multiplies_bf16


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("faster", [True, False])
def test_auto_is_bf16_where_the_processor_multiplies_it_faster(multiplies, faster, monkeypatch):
    """Intel's AVX-512 without AMX multiplies bf16, at half the speed of fp32."""
    dtype = torch.bfloat16 if multiplies and faster else torch.float32
    monkeypatch.setattr(precision, "_bf16_is_faster", lambda: faster)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: multiplies, raising=False)
    assert precision.compute_dtype("auto") == dtype
    assert precision.compute_dtype("auto", "cuda") == torch.bfloat16  # a GPU that is planned for
    assert precision.compute_dtype("bf16") == torch.bfloat16
    assert precision.compute_dtype("fp32") == torch.float32
    assert _multiplies_bf16.__wrapped__() == multiplies  # as the kernels see it


def test_what_is_faster_is_measured(monkeypatch):
    """A processor whose bf16 products take 20 ms, the others nothing; and the other way round."""
    for slow in (torch.bfloat16, torch.float32):

        def slowed(a, b, slow=slow):
            time.sleep(0.02 * (a.dtype == slow))
            return a

        monkeypatch.setattr(torch.Tensor, "__matmul__", slowed)
        assert precision._bf16_is_faster.__wrapped__() == (slow == torch.float32)


def test_auto_is_fp32_on_a_gpu_that_only_emulates_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    assert precision.compute_dtype("auto") == torch.float32


@pytest.mark.parametrize("field", ["date", "precision"])
def test_a_run_keeps_what_it_began_with(field, files, tmp_path):
    """On another day, and on another machine."""
    left_open = short_config(*files, tmp_path / "run", train={"precision": "auto"})
    section = {"date": "prompts", "precision": "train"}[field]
    before = {"date": "2026-02-03", "precision": "bf16"}[field]
    began = settle(left_open, tmp_path / "run", "fp32")
    assert began.train.precision == "fp32" and began.prompts.date is not None
    kept = getattr(began, section).model_copy(update={field: before})
    (tmp_path / "run").mkdir()
    save_config(began.model_copy(update={section: kept}), tmp_path / "run" / "config.yaml")
    again = settle(left_open, tmp_path / "run", "fp32")
    assert getattr(getattr(again, section), field) == before
    asked = {"date": "2026-05-06", "precision": "fp32"}[field]
    named = getattr(left_open, section).model_copy(update={field: asked})
    again = settle(left_open.model_copy(update={section: named}), tmp_path / "run", "bf16")
    assert getattr(getattr(again, section), field) == asked
