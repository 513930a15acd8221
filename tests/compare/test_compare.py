"""`opsd compare`: crossings, ratios and costs against values worked out by hand."""

# ruff: noqa: RUF001 - signs for people to read are meant as such

import json
import math
import random
import re

import numpy as np
import pytest
import yaml
from helpers.lines import read_lines
from safetensors.numpy import save_file

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.compare.comparison import compare, read_runs
from opsd.compare.flops import multiplying_parameters
from opsd.compare.page import _two_digits, page, rows, seed_rows
from opsd.compare.ratios import Target, interpolate, over_seeds, ratio

SIZE = {"model.embed_tokens.weight": (50, 8), "model.layers.0.w": (8, 8), "lm_head.weight": (50, 8)}
WEIGHTS = 8 * 8 + 50 * 8  # the input embedding is looked up, not multiplied


def write_weights(directory, sizes=SIZE):
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in sizes.items()}
    save_file(tensors, directory / "model.safetensors")


def write_run(directory, method, curve, seed=0, problems=100, seconds=0.01):
    """A finished run: `curve` of (tokens, accuracy), a second every 100 tokens."""
    directory.mkdir(parents=True)
    axis, other = "generated_tokens", "trained_tokens"
    if method == "sft":
        axis, other = other, axis
    evaluations, metrics = [], []
    for step, (x, y) in enumerate(curve):
        tokens = {axis: x, other: x if method != "sft" else 0}
        evaluations.append(
            {"step": step, "role": "student", "accuracy": y, "problems": problems, **tokens}
        )
        if step:
            metrics.append({"step": step, "loss": 1.0, "seconds": seconds * x, **tokens})
    for name, lines in (("evaluations", evaluations), ("metrics", metrics)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    (directory / "summary.json").write_text(json.dumps({"method": method, "model": "m"}))
    config = {"method": method, "train": {"seed": seed, "problems_per_step": 2}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    write_weights(directory / "model")
    return directory


def straight(end_tokens, end_accuracy, points=5, start=0.2):
    """A straight line from `start`."""
    return [
        (end_tokens * i / (points - 1), start + (end_accuracy - start) * i / (points - 1))
        for i in range(points)
    ]


def of_tokens(comparison):
    """The one ratio of tokens."""
    (found,) = [one for one in comparison.ratios if one.of == "tokens"]
    return found


def test_interpolation_and_crossing(tmp_path):
    (run,) = read_runs(
        write_run(tmp_path / "a", "opsd", [(0, 0.2), (100, 0.4), (300, 0.3), (400, 0.9)])
    )
    assert interpolate(run.curve, 50) == pytest.approx(0.3)
    assert interpolate(run.curve, 1e9) == 0.9 and interpolate(run.curve, -1) == 0.2
    assert run.reaches(0.3) == pytest.approx(50)  # the first time
    assert run.reaches(0.6) == pytest.approx(350)
    assert run.reaches(0.2) == 0 and run.reaches(0.95) is None


def test_seeds_paired_by_name(tmp_path):
    # OPSD reaches .5 at 100·f tokens, GRPO at 400·f: the seeds' luck f cancels in pairs
    luck = [1.0, 2.0, 4.0]
    directories = []
    for seed, f in enumerate(luck):
        directories.append(write_run(tmp_path / f"o{seed}", "opsd", straight(200 * f, 0.8), seed))
        directories.append(write_run(tmp_path / f"g{seed}", "grpo", straight(800 * f, 0.8), seed))
    comparison = compare(directories, target=0.5)
    found = of_tokens(comparison)
    assert found.method == "opsd" and found.paired and not found.at_least
    assert (found.value, found.low, found.high) == pytest.approx((4, 4, 4))
    opsd, grpo = comparison.methods
    assert opsd.tokens_to_target.value == pytest.approx(
        100 * 2
    ) and grpo.tokens_to_target.value == pytest.approx(400 * 2)
    # Student's t of 2 degrees at 90 %: 2.9200; the logs' deviation is log 2
    reach = 2.9200 * math.log(2) / math.sqrt(3)
    assert opsd.tokens_to_target.high == pytest.approx(200 * math.exp(reach), rel=1e-4)
    assert comparison.budget == 200 and opsd.reached == 3
    # by other seeds: no pairs, a wide interval around the same ratio
    for seed, path in enumerate(directories[1::2]):
        config = {"method": "grpo", "train": {"seed": 10 + seed, "problems_per_step": 2}}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    found = of_tokens(compare(directories, target=0.5))
    assert not found.paired and found.value == pytest.approx(4) and found.low < 2 < 8 < found.high


def test_settings_of_one_method_are_no_seeds_of_each_other(tmp_path, capsys):
    """`opsd compare slow.yaml fast.yaml` trains both with the same seeds, by the same method."""
    ends = {"slow-0": 0.4, "slow-1": 0.5, "fast-0": 0.7, "fast-1": 0.9}
    runs = [
        write_run(tmp_path / name, "opsd", straight(800, end), int(name[-1]))
        for name, end in ends.items()
    ]
    found = {one.name: one.accuracy_at_budget.value for one in compare(runs).methods}
    assert found == {"slow": pytest.approx(0.45), "fast": pytest.approx(0.8)}
    for name in ("slow-0.log", "comparison.md"):  # where a study writes, and a shell's * finds it
        (tmp_path / name).touch()
    arguments = ["--baseline", "slow", "--output", str(tmp_path / "out")]
    assert main(["compare", *map(str, tmp_path.glob("*")), *arguments]) == 0
    assert re.search(r"\n  fast +2 +80.0 %", capsys.readouterr().out)
    other = write_run(tmp_path / "a" / "grpo-0", "grpo", straight(800, 0.3))
    assert {one.key for one in compare([*runs, other]).methods} == {"slow", "fast", "grpo"}
    again = write_run(tmp_path / "slow-seed0", "opsd", straight(800, 0.4))
    with pytest.raises(UserError, match="two runs have the same method, seed and name"):
        compare([*runs, again])


def test_a_setting_named_like_its_method_has_its_own_name_in_the_table(tmp_path):
    names = ("opsd-0", "opsd-1", "opsd-fast-0", "opsd-fast-1")
    runs = [write_run(tmp_path / n, "opsd", straight(800, 0.5), int(n[-1])) for n in names]
    found = compare(runs, baseline="opsd")
    assert [one.name for one in found.methods] == ["opsd", "opsd-fast"]
    assert "OPSD" not in f"{found.target.says} {found.notes}" and "opsd" in found.target.says
    (one,) = compare(runs[:2]).methods
    assert one.name == "OPSD"


@pytest.mark.parametrize("named", ["lr-{}-{}", "lr-{}/seed-{}", "seed{1}/lr_{0}/opsd"])
def test_a_setting_whose_name_has_a_number_like_a_seed(named, tmp_path):
    """lr-1.yaml and lr-2.yaml with seeds 1 and 2: lr-1-1 is no run of "lr", nor is lr-2-2."""
    ends = {(lr, seed): lr / 4 + seed / 100 for lr in (1, 2) for seed in (1, 2)}
    runs = [
        write_run(tmp_path / named.format(*of), "opsd", straight(800, end), of[1])
        for of, end in ends.items()
    ]
    found = [one.accuracy_at_budget.value for one in compare(runs).methods]
    assert found == [pytest.approx(0.265), pytest.approx(0.515)]


def test_each_seed_has_its_own_target(tmp_path):
    """GRPO's best, seed by seed: .28, .5, .7, none (it falls), .7; OPSD needs a 4th, a 2nd, an 8th
    of GRPO's tokens to get there, and in the last seed never does."""
    bests, parts = [0.28, 0.5, 0.7, None, 0.7], [4, 2, 8, 4, None]
    directories = []
    for seed, (best, part) in enumerate(zip(bests, parts, strict=True)):
        # up from .2 to the best at 800 tokens, then down again
        grpo = [(0, 0.2), (400, 0.15), (800, best or 0.1), (1600, 0.1)]
        directories.append(write_run(tmp_path / f"g{seed}", "grpo", grpo, seed))
        # a straight line from .2 that is at the best after 800 / part tokens, and stays there
        opsd = [(0, 0.2), (1600, 0.6)]
        if part is not None:
            opsd[1:] = [(800 / part, best or 0.3), (1600, best or 0.3)]
        directories.append(
            write_run(tmp_path / f"o{seed}", "opsd", opsd, seed, seconds=0.01 * (seed + 1))
        )
    comparison = compare(directories)
    assert comparison.target.by_seed == pytest.approx({0: 0.28, 1: 0.5, 2: 0.7, 4: 0.7})
    assert comparison.target.flat == [3]
    found = of_tokens(comparison)
    assert (found.seeds, found.unreached) == ([0, 1, 2], [4])
    assert found.value == pytest.approx(4)  # (4 · 2 · 8)^(1/3)
    # Student's t of 2 degrees at 90 %: 2.9200; the logs are log 4 - log 2, 0, + log 2
    reach = 2.9200 * math.log(2) / math.sqrt(3)
    assert found.high == pytest.approx(4 * math.exp(reach), rel=1e-4)
    assert found.low == pytest.approx(4 / math.exp(reach), rel=1e-4)
    seconds = next(one for one in comparison.ratios if one.of == "seconds")
    assert seconds.value == pytest.approx((4 / 1 * 2 / 2 * 8 / 3) ** (1 / 3))
    opsd, grpo = comparison.methods
    assert (opsd.asked, opsd.reached, opsd.tokens_to_target) == (
        4,
        3,
        None,
    ) and grpo.tokens_to_target.value == pytest.approx(800)
    assert rows(comparison)[0][5].endswith(", 3 of 4 seeds")
    assert comparison.notes[-3].startswith("Seed 3: GRPO is never better")
    # Wilson's interval of 20 right of 100 ends at .289
    assert comparison.notes[-2].startswith("Seed 0: the best of GRPO is within the 95 %")
    assert comparison.notes[-1] == (
        "Seed 4: OPSD does not reach the target. Without them the ratio flatters OPSD."
    )
    by_seed = [run["tokens_to_target"] for run in comparison.record()["methods"]["opsd"]["runs"]]
    assert by_seed == [pytest.approx(200), pytest.approx(400), pytest.approx(100), None, None]
    assert json.dumps(comparison.record()) and "Seed by seed" in page(comparison)
    lines = seed_rows(comparison)
    # best of GRPO, OPSD at the budget
    assert lines[0] == ["0", "20.0 %", "28.0 %", "28.0 %", "200", "10.0 %", "800"]
    assert lines[3][2:5] == ["–", "30.0 %", "–"] and lines[4][4] == "–"


def test_paired_intervals_cover_the_true_ratio(tmp_path):
    class Seed:
        def __init__(self, seed, tokens):
            self.seed, self.tokens, self.budget = seed, tokens, 1e9

        def reaches(self, target):
            return self.tokens

        def spent(self, of, tokens):
            return tokens

    draw, hits, trials = random.Random(0), {True: 0, False: 0}, 600
    for _ in range(trials):
        luck = [draw.gauss(0, 0.5) for _ in range(4)]
        ours = [Seed(i, math.exp(8 + z + draw.gauss(0, 0.2))) for i, z in enumerate(luck)]
        for paired in (True, False):
            others = [
                Seed(i if paired else 9, 3 * math.exp(8 + z + draw.gauss(0, 0.2)))
                for i, z in enumerate(luck if paired else [draw.gauss(0, 0.5) for _ in range(4)])
            ]
            found = ratio("opsd", ours, others, Target("given", 0.5))
            hits[paired] += found.low <= 3 <= found.high
    assert 0.87 <= hits[True] / trials <= 0.935 and 0.87 <= hits[False] / trials <= 0.955


def test_a_baseline_that_never_arrives_gives_a_lower_bound(tmp_path):
    directories = [
        write_run(tmp_path / "o", "opsd", straight(200, 0.8)),
        write_run(tmp_path / "g", "grpo", straight(1000, 0.4)),
    ]
    comparison = compare(directories, target=0.5)
    found = of_tokens(comparison)
    assert found.at_least and found.value == pytest.approx(10) and found.low is None
    assert rows(comparison)[0][5] == "≥ 10 ×" and rows(comparison)[1][4] == "reached by 0 of 1"
    # by default the target is the baseline's best, which it reaches at its end
    comparison = compare(directories)
    assert comparison.target.by_seed == {0: pytest.approx(0.4)}
    assert comparison.ratios[0].value == pytest.approx(1000 / (200 / 3))
    assert "One seed of OPSD, GRPO" in comparison.notes[0]
    more = write_run(tmp_path / "g1", "grpo", straight(1000, 0.6), 1)
    comparison = compare([*directories, more])
    assert comparison.target.shared == pytest.approx(
        0.4
    )  # what both reach, not .6 nor the mean's .5
    assert comparison.methods[1].reached == 2 and not comparison.ratios[0].at_least


def test_a_target_that_the_base_has_already_gives_no_ratio(tmp_path):
    directories = [
        write_run(tmp_path / "o", "opsd", straight(200, 0.8)),
        write_run(tmp_path / "g", "grpo", straight(200, 0.1)),  # worse than its start, .2
    ]
    comparison = compare(directories, target=0.15)
    assert comparison.ratios == []
    assert any("reached before any training" in note for note in comparison.notes)
    comparison = compare(directories)
    assert comparison.target.flat == [0] and of_tokens(comparison).value is None
    assert rows(comparison)[0][4:6] == ["–", "–"]
    assert any("Seed 0: GRPO is never better" in note for note in comparison.notes)


def test_time_and_flops_beside_tokens(tmp_path):
    run = write_run(tmp_path / "o", "opsd", straight(200, 0.8))
    assert multiplying_parameters(run / "model") == WEIGHTS
    comparison = compare([run, write_run(tmp_path / "s", "sft", straight(200, 0.8))], target=0.5)
    opsd, sft = comparison.methods
    assert (
        opsd.seconds_to_target == sft.seconds_to_target == pytest.approx(1.0)
    )  # 100 tokens at .01 s
    # a token generated 2 N, scored by the teacher 2 N, learned from 6 N
    assert opsd.flops_to_target == pytest.approx(100 * 10 * WEIGHTS)
    assert sft.flops_to_target == pytest.approx(100 * 6 * WEIGHTS)
    assert any("leave the prompts out" in note for note in comparison.notes)
    tied = {name: shape for name, shape in SIZE.items() if name != "lm_head.weight"}
    write_weights(tmp_path / "tied", tied)
    assert multiplying_parameters(tmp_path / "tied") == WEIGHTS
    assert multiplying_parameters(tmp_path / "none") is None
    (tmp_path / "tied" / "model.safetensors").write_bytes(b"nonsense")
    assert multiplying_parameters(tmp_path / "tied") is None


@pytest.mark.parametrize(
    ("method", "sections", "passes"),
    [
        ("opsd", {"teacher": {"mix": [{}, {"context": "student"}]}}, 2),
        ("grpo", {}, 0),
        ("grpo", {"loss": {"distil": 1.0}}, 1),
        ("grpo", {"loss": {"credit": 0.5, "kl": 0.1}}, 2),
        ("grpo", {"loss": {"distil": 1, "kl": 0.1}, "teacher": {"mix": [{}, {}]}}, 3),
        ("distill", {}, 1),
        ("distill", {"teacher": {"mix": [{}, {"context": "teacher"}]}}, 2),
    ],
)
def test_each_pass_of_a_teacher_costs(method, sections, passes, tmp_path):
    run = write_run(tmp_path / "r", method, straight(200, 0.8))
    (run / "config.yaml").write_text(yaml.safe_dump({"method": method, **sections}))
    (found,) = read_runs(run)
    assert found.flops == pytest.approx(200 * (8 + 2 * passes) * WEIGHTS)


def test_several_teachers_cost_their_shares_and_given_text_no_teacher(tmp_path):
    """Of 200 tokens 40 are given; a quarter of the others' are scored by a model of half the size,
    a half by the student's own weights."""
    run = write_run(tmp_path / "r", "opsd", straight(200, 0.8))
    routes = {"a": {"path": str(tmp_path / "half")}, "b": {"policy": "initial"}, "c": {}}
    config = {"method": "opsd", "teacher": {"routes": routes}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = read_lines(run / "metrics.jsonl")
    shares = [(0.25, 0.75), (0.25, 0.25), (0.5, 0.5), (0.0, 0.5)]
    for line, (a, b) in zip(lines, shares, strict=True):
        line |= {"teacher_a_tokens": a, "teacher_b_tokens": b, "sft_tokens": 10}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_weights(tmp_path / "half", {"w": (WEIGHTS // 2,)})
    (found,) = read_runs(run)
    assert found.flops == pytest.approx((200 * 8 + 160 * 2 * (0.25 / 2 + 0.5)) * WEIGHTS)


def test_prompts_are_counted_where_they_can_be_made_again(tmp_path):
    from helpers.training_cases import write_model

    run = write_run(tmp_path / "o", "opsd", straight(200, 0.8))
    write_model(run / "model")
    weights = multiplying_parameters(run / "model")
    sample = {"step": 0, "problem": "1+1", "solution": "2+3+4", "answer": "2"}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    config = {
        "method": "opsd",
        "train": {"seed": 0, "problems_per_step": 2},
        "prompts": {"student": "{{ problem }}", "teacher": "{{ problem }}{{ solution }}"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (found,) = read_runs(run)
    assert found.prompts_counted
    extra = found.flops / weights - 200 * 10  # 4 steps of 2 problems
    lengths = extra / 8
    # student's prompt P twice (2 + 6), teacher's P + 5 tokens once (2): 10 P + 10
    assert lengths == pytest.approx(round(lengths)) and (lengths - 10) % 10 == 0 and lengths > 40


def test_mean_curves_and_bands(tmp_path):
    directories = [
        write_run(tmp_path / str(seed), "opsd", straight(200 + 100 * seed, end), seed)
        for seed, end in enumerate((0.6, 0.8))
    ]
    (method,) = compare(directories, target=0.3).methods
    assert method.curve[0] == (0, pytest.approx(0.2)) and method.curve[-1][0] == 200
    assert method.curve[-1][1] == pytest.approx((0.6 + 0.6) / 2)
    assert method.bands[0] == pytest.approx((0.2, 0.2))
    assert over_seeds([0.5]).low is None
    single = compare([directories[0]], target=0.3).methods[0]
    assert (
        single.bands[0] is not None and single.accuracy_at_budget.low is None
    )  # Wilson's of the problems


def test_the_command_writes_a_table_and_a_page(tmp_path, capsys):
    directories = [
        write_run(tmp_path / f"{method}{seed}", method, straight(300 + 50 * seed, end), seed)
        for method, end in (("opsd", 0.8), ("grpo", 0.5))
        for seed in range(2)
    ]
    output = tmp_path / "out"
    assert main(["compare", *map(str, directories), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "OPSD" in shown and "1 (baseline)" in shown and "2.0 × (2.0–2.0)" in shown
    record = json.loads((output / "comparison.json").read_text())
    assert record["baseline"] == "grpo" and [
        run["seed"] for run in record["methods"]["opsd"]["runs"]
    ] == [0, 1]
    written = (output / "comparison.md").read_text()
    assert "\n| 1 | 20.0 % | 50.0 % | 71.4 % | 175 | 45.7 % | 350 |\n" in written
    assert (output / "comparison.png").stat().st_size > 10_000
    text = (output / "comparison.html").read_text()
    assert text.count("<svg") >= 4 and "band series-opsd" in text and "prefers-color-scheme" in text
    assert "https://" not in text and "<script src" not in text
    hostile = write_run(tmp_path / "<img src=x>", "opsd", straight(300, 0.8), 7)
    assert "<img" not in page(compare([hostile], target=0.5))


def test_errors_name_what_is_wrong(tmp_path):
    good = write_run(tmp_path / "good", "opsd", straight(200, 0.8))
    short = write_run(tmp_path / "short", "opsd", [(0, 0.2)])
    blind = write_run(tmp_path / "blind", "opsd", [])
    (short / "summary.json").unlink()  # as of a run that has stopped
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (([good], 1.5), r"--target is 1\.5: .*at most 1"),
        (([good], None, "ppo"), r"--baseline is 'ppo': the runs have opsd"),
        (([good, good],), r"RUN_DIR: a directory is named twice"),
        (([short],), r"short has fewer than two evaluations, .* not ended; --resume goes on, or"),
        (([blind],), r"blind has fewer than two evaluations, .*: eval\.problems was 0, or leave"),
        (([tmp_path / "empty"],), r"empty holds no run"),
        (([tmp_path / "absent"],), r"absent is not a directory"),
    ]:
        with pytest.raises(UserError, match=message):
            compare(*arguments)


def test_ratios_keep_two_digits():
    shown = [_two_digits(x) for x in (0.699, 2.0, 11.3, 99.4, 99.6, 123.4)]
    assert shown == ["0.70", "2.0", "11", "99", "100", "123"]
