"""The benchmark's own promises: it refuses to time what disagrees, compares like with like, names
who is missing, and writes all of it down.
"""

import inspect
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import candidates, suite
from benchmarks.__main__ import KNOWN, main
from benchmarks.measure import Disagreement, check, interleaved, measure
from benchmarks.page import page
from benchmarks.problem import TASKS, Case, Problem

TINY = Case(8, 70, 6)
PLAIN = ("ours", "ours, per token", "dense", "torch chunked", "trl")  # who needs no compiler


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_candidates_agree(task, frozen):
    """Peers' conventions, translated: each computes what the reference does in fp64."""
    problem = Problem.make(replace(TINY, task=task, frozen=frozen), "cpu")
    found, missing = candidates.candidates(task, "cpu")
    everyone = {"ours", "dense", "compiled", "trl"}
    everyone |= (
        {"ours, per token", "torch chunked", "cce", "cce exact", "quack"}
        if task == "log_prob"
        else {"liger", "liger cute", "liger chunked"}
    )
    assert set(found) | set(missing) == everyone and not set(found) & set(missing)
    assert everyone - {"ours, per token"} <= {*KNOWN}
    found |= (others := candidates.our_others(task))
    assert len(others) == (0 if task == "log_prob" else 2)
    for name in {*PLAIN, *others} & set(found):
        errors = check(found[name](problem), problem.truth(), 1e-4)
        assert set(errors) == {"loss", "dh"} | ({"dW"} if not frozen else set())


def test_who_cannot_run_here_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(candidates.importlib, "import_module", lambda name: 1 / 0)
    found, missing = candidates.candidates("jsd", "cpu")
    assert set(found) == {"ours", "dense", "compiled"}
    assert "CUDA device" in missing["liger"] and "ZeroDivisionError" in missing["trl"]
    assert "CUDA device" in missing["liger cute"]
    assert "ZeroDivisionError" in candidates.candidates("jsd", "cuda")[1]["liger cute"]
    assert "ZeroDivisionError" in candidates.candidates("log_prob", "cuda")[1]["quack"]
    found, missing = candidates.our_backends("cpu")
    assert set(found) == {"ours, torch", "ours, cpp"} and missing["ours, cuda"]


def test_ligers_arguments_are_in_their_places(monkeypatch):
    """No GPU has run them: they are passed by place, the kernels' name as the last."""
    module = pytest.importorskip("liger_kernel.ops.fused_linear_jsd")
    names = [*inspect.signature(module.LigerFusedLinearJSDFunction.forward).parameters][1:]
    passed = {}

    def apply(*arguments):
        passed.update(zip(names, arguments, strict=False))
        return arguments[0].sum()

    monkeypatch.setattr(module.LigerFusedLinearJSDFunction, "apply", apply)
    candidates.liger("nvidia-cutedsl")(Problem.make(replace(TINY, task="jsd"), "cpu"))
    wanted = {"shift_labels": None, "jsd_beta": 0.5, "ignore_index": -100, "temperature": 1.0}
    wanted |= {"accum_dtype": None, "jsd_impl": "nvidia-cutedsl"}
    assert {name: passed[name] for name in wanted} == wanted and len(passed) == 10


def test_a_red_comparison_is_not_timed():
    calls = []

    def wrong(problem):
        calls.append("wrong")
        result = candidates.dense(problem)
        return result._replace(d_hidden=1.01 * result.d_hidden)

    def broken(problem):
        calls.append("broken")
        raise MemoryError("no such memory")

    run = {"ours": candidates.ours(), "wrong": wrong, "broken": broken}
    row = measure(TINY, "cpu", run, rounds=2)
    assert row["red"] == {"wrong": "differs by 1.0e-02 in dh from ours"}
    assert row["failed"] == {"broken": "MemoryError: no such memory"}
    assert calls == ["wrong", "broken"] and set(row["seconds"]) == {"ours", "gemms"}
    # Ours is held to fp64; where it is wrong, nobody is timed.
    row = measure(TINY, "cpu", {"ours": wrong, "dense": candidates.dense}, rounds=2)
    assert row["red"] == {"ours": "differs by 1.0e-02 in dh from fp64"}
    assert not row["seconds"] and len(calls) == 3


def test_a_missing_gradient_disagrees():
    problem = Problem.make(TINY, "cpu")
    truth = problem.truth()
    with pytest.raises(Disagreement, match="gives no dW"):
        check(truth._replace(d_weight=None), truth, 1.0)
    with pytest.raises(Disagreement, match="differs by nan in loss"):
        check(truth._replace(loss=torch.tensor(torch.nan)), truth, 1.0)


def test_rounds_are_interleaved():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(calls, rounds=3)
    assert order == ["a", "b"] * 3
    for kind in ("seconds", "cpu_seconds"):
        for t in times[kind].values():
            assert len(t["all"]) == 3 and t["min"] <= t["median"] <= max(t["all"])
    # Out of time: two rounds all the same.
    assert len(interleaved(calls, 9, limit_seconds=0)["seconds"]["a"]["all"]) == 2


def test_bare_products_of_many_tokens(monkeypatch):
    """In parts of 2 GiB of logits: each part multiplies its own tokens."""
    sizes = []
    mm = torch.mm

    def recorded(a, b, **options):
        sizes.append((a.shape[0], a.shape[1], b.shape[1]))
        return mm(a, b, **options)

    monkeypatch.setattr(torch, "mm", recorded)
    problem = Problem.make(Case(5, 2**18, 1), "cpu")
    monkeypatch.setattr(candidates, "MOST_LOGITS", 2**19)
    candidates.gemms(problem)
    v = 2**18
    part = [(2, 1, v), (2, 1, v), (2, v, 1), (v, 2, 1)]
    last = [(1, 1, v), (1, 1, v), (1, v, 1), (v, 1, 1)]
    assert sizes == [*part, *part, *last]
    sizes.clear()
    candidates.gemms(problem, parts=False)
    assert sizes == [(5, 1, v), (5, 1, v), (5, v, 1), (v, 5, 1)]
    monkeypatch.setattr(candidates, "MOST_LOGITS", 4 * 70)
    row = measure(TINY, "cpu", {"ours": candidates.ours()}, rounds=2)
    assert set(row["seconds"]) == {"ours", "gemms", "gemms, one block"}
    assert set(row["peak_bytes"]) <= {"ours"}


def test_suites():
    for rows in (suite.quick(), suite.cpu(), suite.gpu()):
        assert len({row.case for row in rows if not row.compiled}) == len(
            [row for row in rows if not row.compiled]
        )
        assert {row.case.task for row in rows} == set(TASKS)
        assert {row.case.frozen for row in rows} == {True, False}
    # What the goals of the GPU are stated for comes first.
    first = suite.gpu()[0]
    assert first.case == Case(8192, 151936, 4096, "bfloat16") and first.backends and first.budgets


def test_a_run_leaves_json_and_a_page(tmp_path, capsys):
    command = ["--shape", "8,70,6", "--only", "dense,liger", "--rounds", "2"]
    assert main([*command, "--shared", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert [set(row["seconds"]) for row in report["rows"]] == [{"ours", "dense", "gemms"}] * 8
    for row in report["rows"]:
        assert (
            set(row["cpu_seconds"]) == set(row["seconds"]) and row["errors"]["dense"]["dh"] < 1e-4
        )
        assert row["gradient_bytes"] == 4 * 8 * 6 + (0 if row["frozen"] else 4 * 70 * 6)
    assert report["missing"] == {"liger": "its kernels are Triton's: needs a CUDA device"}
    machine = report["machine"]
    assert machine["commit"] and machine["versions"]["torch"] == torch.__version__
    assert "missing: liger" in capsys.readouterr().out
    drawn = (tmp_path / "index.html").read_text()
    assert "processor seconds" in drawn and "needs a CUDA device" in drawn
    assert drawn.count("jsd frozen float32 N=8 V=70 D=6") == 1


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--shape", "8,70"], "--shape: got '8,70', must be three numbers N,V,D above 0"),
        (["--shape", "8,0,6"], "--shape: got '8,0,6'"),
        (["--shape", "8,70,6", "--only", "dense,lgier"], "--only: no lgier; there are ours, dense"),
    ],
)
def test_mistakes_are_one_line(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and wanted in capsys.readouterr().err.splitlines()[-1]


def test_no_case_is_begun_after_the_time(tmp_path):
    assert main(["--quick", "--minutes", "-1", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert not report["rows"] and len(report["left_out"]) == len(suite.quick())
    assert "the time was over" in (tmp_path / "index.html").read_text()


def test_the_page_shows_sweeps_and_reds():
    def row(case, red):
        times = {"ours": 2.0, "gemms": 1.0} | ({} if red else {"dense": 3.0})
        timed = {n: {"min": t, "median": t, "all": [t]} for n, t in times.items()}
        return {
            **case.json(),
            "seconds": timed,
            "cpu_seconds": timed,
            "peak_bytes": {"ours": 5 * 2**20, "dense": 9 * 2**20},
            "gradient_bytes": 2**20,
            "errors": {"dense": {"loss": 1e-6}},
            "red": {"dense": "differs by <much>"} if red else {},
            "failed": {},
        }

    rows = [row(replace(TINY, tokens=n), red=n == 32) for n in (8, 16, 32)]
    machine = {"processor": "p", "threads": 1, "cores": 2, "gpu": None, "versions": {}}
    machine |= {"commit": "abc", "uncommitted_changes": True}
    report = {"machine": machine, "started": "now", "shared": False, "missing": {}}
    text = page(report | {"left_out": [], "rows": rows})
    assert text.count("<svg") == 1 and "V = 70, D = 6" in text
    assert "red, not timed: differs by &lt;much&gt;" in text and "Uncommitted" in text
    assert (
        "<td>2000.0</td><td>2000.0</td><td>2.00</td><td>1.00</td><td>4</td><td>" in text
    )  # 5 MiB less the gradients' 1
    assert "://" not in text.split("<svg")[0]


def test_a_gpu_is_asked_for_by_name(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
