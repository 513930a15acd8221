"""The sitting at a GPU: its limits, its rehearsal, and what it leaves when parts fail."""

import json
import os
import re
import sys
from io import StringIO
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import candidates, suite, trl_step
from benchmarks.gpu import __main__ as sitting
from benchmarks.gpu import rules
from benchmarks.gpu.sitting import CALL_SECONDS, CALLS, SITTING_SECONDS, Part
from benchmarks.step import GPU_CASES
from opsd.config.sections import TrainSection
from opsd.prefix.attention import KERNELS

ROOT = Path(__file__).parents[2]
PARTS = [part for parts in CALLS.values() for part in parts]
START = 45  # seconds of a call that none of its parts has: pip's, and describing the machine


def test_every_call_fits_into_its_time():
    for parts in CALLS.values():
        assert sum(part.seconds for part in parts) + START <= CALL_SECONDS
    assert sum(part.seconds for part in PARTS) + START <= SITTING_SECONDS


def test_rules_name_what_there_is():
    """Files, and the constants that are to be changed in them."""
    for rule in (*rules.RULES, *rules.BENCH_RULES, *rules.STEP_RULES, *rules.TRL_RULES):
        for file in re.findall(r"[\w/-]+\.(?:py|h|cu|md)", rule.otherwise):
            assert (ROOT / file).is_file(), rule
        for name, file in re.findall(r"([A-Z_]{4,})\b.*? in ([\w/]+\.\w+)", rule.otherwise):
            assert re.search(rf"\b{name}\b.* = ", (ROOT / file).read_text()), rule
        for option in re.findall(r"train\.([a-z_]+)", rule.otherwise):
            assert option in TrainSection.model_fields, rule


def test_commands_name_what_there_is():
    """Tests that a GPU runs, and options that the benchmarks have."""
    helped = {}
    for module, main in (("benchmarks", bench.main), ("benchmarks.trl_step", trl_step.main)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", text := StringIO())
            with pytest.raises(SystemExit):
                main(["--help"])
        helped[module] = text.getvalue()
    helped["benchmarks.step"] = (ROOT / "benchmarks" / "step.py").read_text()
    for part in PARTS:
        for arguments in (part.arguments, part.rehearsal):
            if isinstance(arguments, str):
                continue
            for path in (word for word in arguments if word.startswith("tests/")):
                found = [ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("test_*.py")
                assert any(
                    re.search(r"on_gpu|mark\.gpu|OnGpu|BACKENDS|DEVICE", x.read_text())
                    for x in found
                )
            module = arguments[arguments.index("-m") + 1]
            for option in (w for w in arguments if w.startswith("--") and module in helped):
                assert option in helped[module], (part.name, option)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The parts whose commands are this sitting's own; pytest's only collect, and the other
    benchmarks have tests of their own.
    """
    output = tmp_path_factory.mktemp("gpu")
    own = tuple(p for p in CALLS["check"] if "benchmarks.gpu" in p.arguments[1])
    assert [part.name for part in own] == ["smoke", "terms"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sitting, "ROOT", ROOT)
        patch.setitem(CALLS, "check", own)
        status = sitting.main(["check", "--cpu", "--output", str(output)])
    return status, json.loads((output / "check.json").read_text()), output


def test_a_rehearsal_leaves_the_report(rehearsed):
    status, report, output = rehearsed
    assert status == 0, (output / "check.log").read_text()
    assert report["rehearsal"] and report["machine"]["commit"] and report["machine"]["versions"]
    smoke, terms = report["parts"]
    assert all(check["passed"] for check in smoke["results"]["checks"])
    assert len(smoke["results"]["checks"]) >= 6 and smoke["exit"] == terms["exit"] == 0
    names = [row["what"] for row in terms["results"]["rows"]]
    assert "copy" in names and "cpp gradient at once, in 16 bits" in names
    assert "=== terms:" in (output / "check.log").read_text()


def test_every_rule_reads_what_is_measured(rehearsed):
    """By the names of the terms, with a backend's and the GPU's sizes in the place of the CPU's."""
    rows = {
        row["what"]: {**row, "GB_s": 1.0, "TF_s": 1.0}
        for row in rehearsed[1]["parts"][1]["results"]["rows"]
    }
    for name in list(rows):
        for backend in ("cuda", "triton"):
            rows[name.replace("cpp", backend)] = rows[name]
        for n in (256, 512, 683, 1024, 2048, 8192):
            rows[name.replace("8 rows", f"{n} rows")] = rows[name]
            rows[f"dW added to fp32, {n} rows"] = rows["dW in 16 bits, 8 rows"]
    said = rules.verdicts(rows)
    assert len(said) == len(rules.RULES) and not any("not measured" in line for line in said)
    slow = {**rows, "cuda normalisers": {"GB_s": 0.1, "ms": 1.0}}
    assert rules.verdicts(slow)[0].startswith("NEXT: cuda's normalisers")
    assert "cp.async" in rules.verdicts(slow)[0]
    assert "not measured" in rules.verdicts({})[0]


class Asked(dict):
    """Rows that have whatever a rule asks for, and remember it."""

    def __init__(self):
        self.names = []

    def __getitem__(self, case):
        return SimpleRow(lambda name: self.names.append((case, name)) or 1.0)


class SimpleRow:
    def __init__(self, ask):
        self.ask = ask

    def __getitem__(self, name):
        return self.ask(name)


def test_rules_of_whole_calls_and_steps_ask_for_what_is_measured():
    """Cases and candidates that the GPU's suite has, and ways that a step has."""
    asked = Asked()
    assert all(rule.verdict(asked).startswith(("as", "NEXT")) for rule in rules.BENCH_RULES)
    rows = {}
    for row in suite.gpu():
        more = {"gemms", rules.ONE_BLOCK, *candidates.our_budgets(row.budgets)}
        if row.backends:
            more |= {f"ours, {name}" for name in ("triton", "cuda")}
        found = candidates.candidates(row.case.task, "cuda")
        rows[row.case.label] = rows.get(row.case.label, set()) | more | {*found[0], *found[1]}
    assert asked.names and all(name in rows[case] for case, name in asked.names)
    asked = Asked()
    assert all(rule.verdict(asked).startswith(("as", "NEXT")) for rule in rules.STEP_RULES)
    ways = {*(f"shared, {kernel}" for kernel in KERNELS), "compiled", "naive", "trl"}
    assert {case for case, _ in asked.names} == {str(GPU_CASES[1])}
    assert {name for _, name in asked.names} <= ways
    source = (ROOT / "benchmarks" / "step_ways.py").read_text()
    assert all(f'found["{name}"]' in source for name in ("compiled", "naive", "trl"))


def test_reports_are_read(tmp_path, monkeypatch):
    """As the benchmarks write them; with a GPU the sitting says what follows."""
    times = {"ours": 2.0, "gemms": 1.0, rules.ONE_BLOCK: 1.8, "trl": 1.0}
    seconds = {name: {"min": t, "median": t, "all": [t]} for name, t in times.items()}
    said = rules.of_bench({"rows": [{**rules.KL.json(), "seconds": seconds}]})
    assert said[0] == "as counted on: bare products in one block ÷ forward KL 0.90 (at least 0.83)"
    assert said[6].startswith("NEXT: TRL's forward KL ÷ ours 0.50") and "not measured" in said[1]
    case = dict(
        zip(
            ("problems", "rollouts", "student", "teacher", "length"),
            (4, 8, 200, 1000, 1024),
            strict=True,
        )
    )
    seconds = {"shared, flash": {"min": 1.0}, "naive": {"min": 1.4}}
    said = rules.of_step({"rows": [{"case": case, "seconds": seconds}]})
    assert "not measured" in said[0] and "alone ÷ contexts once 1.40" in said[3]
    report = {"times_faster": 2.5, "times_less_memory": 0.5}
    writes = f"import pathlib; pathlib.Path('{{out}}/trl.json').write_text('{json.dumps(report)}')"
    part = Part("trl_step", 20, ("-c", writes, "{out}/trl.json"), "no rehearsal")
    with open(tmp_path / "log", "w") as log:
        done = sitting.run_part(part, tmp_path, False, dict(os.environ), log)
    assert done["results"] == report and done["verdicts"][0].startswith("as counted on: times fa")
    assert done["verdicts"][1].startswith("NEXT: times less memory than TRL 0.50")


def test_a_part_that_fails_or_hangs_costs_no_other_its_time(tmp_path, monkeypatch):
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    parts = (
        Part("hangs", 1, ("-c", hangs), ("-c", hangs)),
        Part("fails", 9, ("-c", "1 / 0"), ("-c", "1 / 0")),
        Part("has no tool", 9, ("-c", "0"), ("-c", "0"), tool="no-such-tool"),
        Part("needs the GPU", 9, ("-c", "0"), "no rehearsal"),
        Part("runs", 9, ("-c", "print(7)"), ("-c", "print(7)")),
    )
    monkeypatch.setitem(CALLS, "check", parts)
    described = type("Done", (), {"returncode": 0, "stdout": "{}", "stderr": ""})
    monkeypatch.setattr(sitting.subprocess, "run", lambda *a, **k: described)
    assert sitting.main(["check", "--cpu", "--output", str(tmp_path)]) == 1
    found = {p["name"]: p for p in json.loads((tmp_path / "check.json").read_text())["parts"]}
    assert found["hangs"]["timed_out"] and found["hangs"]["seconds"] < 5
    assert found["fails"]["exit"] == 1 and found["runs"]["exit"] == 0
    assert found["has no tool"]["left_out"] == "there is no no-such-tool here"
    assert found["needs the GPU"]["left_out"] == "no rehearsal"
    log = (tmp_path / "check.log").read_text()
    assert "ZeroDivisionError" in log and "\n7\n" in log


def test_the_commit_travels_with_a_copy_that_has_no_history(tmp_path, monkeypatch):
    from benchmarks import machine

    (tmp_path / "commit.json").write_text('{"commit": "abc", "uncommitted_changes": true}')
    monkeypatch.setenv("OPSD_CARRIED", str(tmp_path))
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)
    assert machine.commit() == {"commit": "abc", "uncommitted_changes": True}
    monkeypatch.delenv("OPSD_CARRIED")
    assert machine.commit() == {"commit": None, "uncommitted_changes": False}
