"""Evaluations that somebody has changed: continued with what is whole of them, or refused."""

import json
import resource
import time

import pytest
from helpers.run_attacks import attack, copied, plain

from opsd.common.errors import UserError
from opsd.evaluate.answers import Completion, CompletionLog, Shard, claim, read_completions
from opsd.runs.records import CompletionLine, checked_lines

IDENTITY = {"model": "ab12", "benchmark": "cd34", "samples": 2, "temperature": 1.0, "seed": 0}
DESCRIPTION = {"model": "m", "date": "2026-01-02", "samples": 2}
FILES = ["completions-1-of-2.jsonl", "completions-2-of-2.jsonl", "evaluation.json"]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Of four problems, by two processes."""
    directory = tmp_path_factory.mktemp("good") / "run"
    claim(directory, IDENTITY, DESCRIPTION)
    for index in (1, 2):
        with CompletionLog(directory, Shard(index, 2)) as log:
            places = [(p, s) for p in range(index - 1, 4, 2) for s in range(2)]
            log.append(
                Completion(*place, f"is {place} \\boxed{{2}} é", 5, True) for place in places
            )
    return directory


def anothers(draw, directory) -> None:
    """An evaluation as another release writes it: keys more, less, of another name."""
    file = directory / draw.choice(FILES)
    text = file.read_text()
    records = [json.loads(one) for one in ([text] if file.suffix == ".json" else text.splitlines())]
    more = {"version": [2, "0.9", None], "date": ["2026-13-45", 7, None], "description": [{}, "a"]}
    more |= {"logprobs": [[-0.5]], "tokens": [[1, 2], 10**30], "finish_reason": ["stop"], "": [1]}
    for record in draw.sample(records, draw.randint(1, len(records))):
        holder = record["identity"] if "identity" in record and draw.random() < 0.5 else record
        how, key = draw.randrange(3), draw.choice(sorted(holder))
        if how == 0:
            del holder[key]
        elif how == 1:
            holder[draw.choice([key + "s", key.upper(), f"{key} "])] = holder.pop(key)
        else:
            name = draw.choice(sorted(more))
            holder[name] = draw.choice(more[name])
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def believed(path) -> list[dict]:
    """The objects that lines of the file hold, as Python's own reader sees them."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            one = json.loads(line)
        except (ValueError, RecursionError):
            continue
        found += [one] if isinstance(one, dict) else []
    return found


def test_a_changed_evaluation_goes_on_with_what_is_whole(draw, evaluation, tmp_path):
    place = tmp_path / "place"
    changed = copied(evaluation, place)
    if draw.random() < 0.25:
        anothers(draw, changed)
    else:
        attack(changed, FILES, draw)
    secret = {path: path.read_bytes() for path in (place / "outside").iterdir()}
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bad: list[str] = []
    try:
        date = claim(changed, IDENTITY, DESCRIPTION)
        with CompletionLog(changed, Shard(1, 2)) as log:
            found = read_completions(changed, bad=bad)
            log.append([Completion(9, 0, "new", 1, True)])
        again = read_completions(changed)
    except UserError as error:
        assert len(str(error)) < 3000 and str(changed) in str(error)
    else:
        told = [
            one for name in FILES[:2] if plain(changed / name) for one in believed(changed / name)
        ]
        for completion in found.values():
            assert vars(completion) in [{k: one.get(k) for k in vars(completion)} for one in told]
            assert type(completion.problem) is int and type(completion.finished) is bool
        assert again == {(9, 0): Completion(9, 0, "new", 1, True)} | found | (
            {(9, 0): found[9, 0]} if (9, 0) in found else {}
        )
        lines = [f"{p.parent.name}/{p.name}:" for p in changed.glob("completions-*")]
        assert all(said.startswith(tuple(lines)) and len(said) < 1500 for said in bad)
        saved = json.loads((changed / "evaluation.json").read_text())
        assert {name: saved["identity"][name] for name in IDENTITY} == IDENTITY
        assert date == (saved.get("date") or DESCRIPTION["date"])
    assert {path: path.read_bytes() for path in (place / "outside").iterdir()} == secret
    assert time.process_time() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


def test_each_bad_line_is_counted_and_named(tmp_path):
    good = json.dumps(vars(Completion(0, 0, "a", 1, True)))
    path = tmp_path / "completions-1-of-1.jsonl"
    path.write_text(f"{good}\n7\n\n{good.replace('0', '-1')}\n{good}\n" + good[:9])
    bad: list[str] = []
    assert len(list(checked_lines(path, CompletionLine, bad))) == 2
    assert [said.partition(" (")[0].partition(":")[2] for said in bad] == ["2", "4"]
    with pytest.raises(UserError, match=r"damaged in line 2 .*; restore the line, or delete it"):
        list(checked_lines(path, CompletionLine))
    path.write_text("7\n" * 3000)
    with pytest.raises(UserError, match="has more than 1000 lines that no run writes"):
        list(checked_lines(path, CompletionLine, bad))
