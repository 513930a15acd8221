"""`benchmarks.trl_step`: both trainers take the same steps; the report."""

import pytest
import torch

from benchmarks import trl_step
from benchmarks.trl_step import Case, compare


def test_both_trainers_lose_the_same_at_every_step():
    """Of a case of seconds; later steps agree only if the updates do."""
    case = Case(rollouts=8, problems=1, problem=6, solution=20, length=10, steps=3)
    report = compare(Case(**{**vars(case), "vocabulary": 64, "width": 32, "layers": 2}), rounds=1)
    theirs, ours = (torch.tensor(report["losses"][way]) for way in ("trl", "opsd"))
    assert len(theirs) == 3 and (theirs > 1e-4).all() and theirs[0] != theirs[1]
    torch.testing.assert_close(ours, theirs, rtol=trl_step.AGREEMENT[False], atol=0)
    for way in ("trl", "opsd"):
        assert report[way]["seconds"] > 0 and report[way]["peak_bytes"] >= 0
    assert report["times_faster"] == pytest.approx(
        report["trl"]["seconds"] / report["opsd"]["seconds"]
    )
    assert report["times_less_memory_in_all"] > 0
    assert report["machine"]["versions"]["trl"]


def test_losses_that_differ_are_no_benchmark(monkeypatch):
    def worker(case, way, directory):
        return {"losses": [1.0] if way == "trl" else [1.1]}

    monkeypatch.setattr(trl_step, "_worker", worker)
    monkeypatch.setattr(trl_step, "write_inputs", lambda *_: None)
    with pytest.raises(SystemExit, match="the losses differ by 1"):
        compare(Case(), 1)


def test_the_gpu_case_is_qwen3_1_7b_and_needs_a_gpu(monkeypatch, capsys):
    case = trl_step.ON_GPU
    assert (case.width, case.layers, case.width // case.heads) == (2048, 28, 128)
    assert case.problems * case.rollouts == 32 and case.length == 1024
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trl_step.main(["--gpu"]) == 1
    assert "there is no GPU" in capsys.readouterr().err
