"""A failed step's files that somebody has changed: replayed as they are, or refused in one line."""

import copy
import math
import resource
import time
import zipfile
from dataclasses import asdict

import pytest
import torch
from helpers.mutations import damaged
from helpers.run_attacks import mutated
from helpers.terminal import obeyed
from helpers.training_cases import short_config

from opsd.cli.main import main
from opsd.common.display import Display
from opsd.models.load import load_model
from opsd.models.lora import add_adapters
from opsd.models.moving_average import MovingAverage
from opsd.objectives import Sample, SampleGroup
from opsd.training import failed_steps
from opsd.training.replay import replay

KINDS = {
    "live": {},
    "ema": {"teacher": {"policy": "ema"}},
    "grpo of adapters": {
        "method": "grpo",
        "model": {"lora": {"rank": 2, "alpha": 4}},
        "rollout": {"group_size": 2},
    },
}
FEW = [4, 5, 6]
TENSORS = [
    torch.zeros(()), torch.zeros(64), torch.zeros(64, dtype=torch.float64), torch.ones(64).bool(),
    torch.zeros(64).to_sparse(), torch.zeros(64, device="meta"), torch.zeros(1).expand(64),
    torch.full((64,), math.nan), torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, 64),
    torch.zeros(0), torch.zeros(1).expand(10**12), torch.zeros(64, dtype=torch.complex64),
    torch.zeros(9).as_strided((64,), (0,)), torch.arange(64), torch.zeros(64).to(torch.float8_e5m2),
    torch.nn.Parameter(torch.zeros(64)), torch.zeros(128)[::2], torch.zeros(64, 0, 2**40),
    torch.zeros(2, 32).to_sparse_csr(), torch.full((64,), 1e30),
]  # fmt: skip
SHARED = ["a"]
for _ in range(40):  # of 2^40 items, if each is looked at
    SHARED = [SHARED, SHARED]
INSIDE: list = []
for _ in range(300):
    INSIDE = [INSIDE]
NESTS = [SHARED, INSIDE, {"a": SHARED}, (SHARED, INSIDE), [0] * 10**6, "a" * 10**7]


@pytest.fixture(scope="module")
def good(files, tmp_path_factory):
    """A file of each kind, what it holds, and what its replay finds."""
    made = {}
    for kind, sections in KINDS.items():
        config = short_config(*files, tmp_path_factory.mktemp("run"), **sections)
        model, _ = load_model(config.model)
        grpo, average = config.method == "grpo", None
        if grpo:
            model = add_adapters(model, config.model)
        if kind == "ema":
            average = MovingAverage(model, 0.9, torch.device("cpu"))
        more = {"advantage": 0.5, "old_log_probs": [-1.0] * 3} if grpo else {"factors": [1.0, 0, 2]}
        engine = {"sampling_log_probs": [-1.0] * 3, **more}
        samples = [Sample(FEW, 0.1, **more), Sample([7, 8, 9], 0.1, **engine)]
        groups = [SampleGroup([1, 2, 3], samples, () if grpo else ([1, 3, 2, 2],))] * 2
        holds = failed_steps.failed_step(config, 3, groups, model, average)
        file = failed_steps.save_failed_step(tmp_path_factory.mktemp("file"), holds)
        found = replay(file, Display(quiet=True))
        assert len(found) == 4 and all(one.finite and one.gradient for one in found)
        made[kind] = file, holds, found
    return made


def attacked(draw, file, holds, target):
    """Write a changed file."""
    how = draw.randrange(8)
    if how < 5:
        holds = dict(holds)
        key = draw.choice([*holds, "groups", "groups"])
        if how == 0:
            holds = mutated(holds, draw, TENSORS)
        else:
            holds[key] = mutated({key: holds[key]}, draw, [*TENSORS, *NESTS]).get(key)
        torch.save(holds, target)
    elif how == 5:  # another archive: compressed, a member less or empty or twice
        with zipfile.ZipFile(file) as source:
            members = [(name, source.read(name)) for name in source.namelist()]
        number, what = draw.randrange(len(members)), draw.randrange(8)
        members[number : number + 1] = {
            0: [],
            1: [(members[number][0], b"")],
            2: [members[number]] * 2,
            3: [members[number]],
            4: [(members[number][0], bytes(3 * 10**8))],
            5: [("../" * 9 + "tmp/opsd-attack", b"a"), members[number]],
            6: [(members[number][0].upper(), members[number][1])],
            7: [members[number], *((f"archive/data/{n}", b"") for n in range(9000, 19_000))],
        }[what]
        way = zipfile.ZIP_DEFLATED if draw.random() < 0.5 else zipfile.ZIP_STORED
        with zipfile.ZipFile(target, "w", way) as other:
            for name, data in members:
                other.writestr(name, data)
    else:
        target.write_bytes(damaged(draw, file.read_bytes()))


def same(one, other) -> bool:
    """Whether both hold the same, types and bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.layout == other.layout and (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one)


def has_a_bomb(file) -> bool:
    """Whether an archive's member is too large, be it one that torch does not read."""
    with zipfile.ZipFile(file) as archive:
        return max(one.file_size for one in archive.infolist()) > 10**8


def numbers(values) -> bool:
    return all(type(value) in (int, float) for value in values)


def could_be_written(holds, good) -> bool:
    """Whether a run could have written this, as far as a plain look tells."""
    for key in ("weights", "average"):
        mine, its = holds[key], good[key]
        if its is None:
            assert mine is None
            continue
        kinds = [{n: (t.dtype, t.shape) for n, t in one.items()} for one in (mine, its)]
        assert kinds[0] == kinds[1]
    names = set(asdict(Sample([], 1.0)))
    for group in holds["groups"]:
        contexts = [group["student"], *group.get("teachers", [])]
        assert set(group) <= set(asdict(SampleGroup([], []))) and group["samples"]
        assert len(group.get("coefficients", [1])) == 1
        for sample in group["samples"]:
            assert set(sample) <= names
            contexts.append(sample["rollout"])
            lists = [sample.get(f"{of}_log_probs") for of in ("old", "sampling")]
            for values in filter(lambda one: one is not None, [*lists, sample.get("factors")]):
                assert len(values) == len(sample["rollout"]) and numbers(values)
            each = [sample["weight"], sample.get("advantage", 0), sample.get("credit", 0)]
            assert numbers(each)
            teacher = sample.get("teacher", 0)
            assert type(teacher) is int and 0 <= teacher < max(1, len(group.get("teachers", [])))
        assert all(type(token) is int and 0 <= token < 100 for ids in contexts for token in ids)
    return type(holds["step"]) is int and set(holds) >= set(good)


def test_a_changed_file_is_replayed_as_it_is_or_refused(draw, good, tmp_path, capsys):
    file, holds, found = good[draw.choice(list(KINDS))]
    target = tmp_path / "failed-step-3.pt"
    attacked(draw, file, holds, target)
    capsys.readouterr()
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(["replay", str(target)])
    assert time.process_time() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB
    shown = capsys.readouterr()
    assert set(obeyed(shown.out + shown.err)) <= {"\n"} and "Traceback" not in shown.err
    if code == 0:
        read = torch.load(target, weights_only=True)
        assert could_be_written(read, holds)
        if same(read, holds):
            assert replay(target, Display(quiet=True)) == found
    else:
        said = shown.err.splitlines()[-1]
        assert code == 1 and said.startswith("opsd: FILE is ") and len(said) < 2500
        assert not same(holds, torch_reads(target)) or has_a_bomb(target)


def torch_reads(file):
    """What torch reads there, unless its archive is not as torch writes them."""
    try:
        with zipfile.ZipFile(file) as archive:
            stored = all(one.compress_type == 0 for one in archive.infolist())
            assert stored and archive.testzip() is None
        return torch.load(file, weights_only=True)
    except Exception:
        return None


def test_each_tensor_must_be_there_and_fit(good, tmp_path, capsys):
    _, holds, _ = good["ema"]
    target, name = tmp_path / "failed-step-3.pt", "model.norm.weight"
    one = torch.zeros(1)
    for key in ("weights", "average"):
        less = {n: t for n, t in holds[key].items() if n != name}
        for changed, said in (
            (less, f"{key} lack '{name}'"),
            ({**holds[key], "x": one}, f"{key} have 'x'"),
            ({**less, name: one}, f"{key}.{name} is float32 [1]: the model's is float32 [64]"),
            ({**less, name: one.expand(64).double()}, "is float64 [64]: "),
            (None, f"{key} are NoneType"),
        ):
            torch.save(holds | {key: changed}, target)
            assert main(["replay", str(target)]) == 1
            assert said in capsys.readouterr().err


def test_what_torch_copies_of_an_archive_is_small(good, tmp_path, capsys):
    file, target = good["live"][0], tmp_path / "failed-step-3.pt"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(target, "w") as other:
        for name in source.namelist():
            other.writestr(name, bytes(2 << 20) if name.endswith("/version") else source.read(name))
    assert main(["replay", str(target)]) == 1
    assert "/version in it has 2,097,152 bytes" in capsys.readouterr().err


def test_an_average_without_tensors_is_refused_where_there_is_none(good, tmp_path, capsys):
    _, holds, _ = good["live"]
    torch.save(holds | {"average": {}}, tmp_path / "failed-step-3.pt")
    assert main(["replay", str(tmp_path / "failed-step-3.pt")]) == 1
    assert "average is in it, and a run of its config has none" in capsys.readouterr().err


def test_a_damaged_weight_is_noticed(good, tmp_path, capsys):
    """torch itself compares no checksum."""
    file, holds, _ = good["live"]
    content = bytearray(file.read_bytes())
    place = content.index(holds["weights"]["model.norm.weight"].numpy().tobytes())
    content[place + 2] ^= 1
    target = tmp_path / "failed-step-3.pt"
    target.write_bytes(content)
    assert main(["replay", str(target)]) == 1
    assert "in it is damaged" in capsys.readouterr().err


def nested(levels):
    """A few lists that stand for 2^levels numbers."""
    one = [0]
    for _ in range(levels):
        one = [one, one]
    return one


@pytest.mark.parametrize("key", ["groups", "config", "weights", "average"])
def test_lists_that_repeat_one_another_are_refused(key, good, tmp_path, capsys):
    _, holds, _ = good["live"]
    value = {**holds["config"], "x": nested(24)} if key == "config" else nested(24)
    torch.save({**holds, key: value}, tmp_path / "failed-step-3.pt")
    assert main(["replay", str(tmp_path / "failed-step-3.pt")]) == 1
    assert "its lists repeat one another without end" in capsys.readouterr().err
    inside = [0]
    inside.append(inside)
    torch.save({**holds, key: inside}, tmp_path / "failed-step-3.pt")
    assert main(["replay", str(tmp_path / "failed-step-3.pt")]) == 1
    assert "its lists repeat one another without end" in capsys.readouterr().err


def test_a_compressed_file_is_refused(good, tmp_path, capsys):
    file, _, _ = good["live"]
    target = tmp_path / "failed-step-3.pt"
    with zipfile.ZipFile(file) as one, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as other:
        for name in one.namelist():
            other.writestr(name, one.read(name) + bytes(1 << 20) * name.endswith("/data/0"))
    assert main(["replay", str(target)]) == 1
    assert "it is compressed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda group: group.update(student=[1, 10**6]), "groups hold tokens"),
        (lambda group: group.update(student=[-1]), "groups hold tokens"),
        (lambda group: group.update(student=["1"]), "groups.0.student.0 is '1'"),
        (lambda group: group.update(student=[]), "a context without tokens"),
        (lambda group: group.update(more=1), "groups.0.more"),
        (lambda group: group.update(samples=[]), "groups.0 has no samples"),
        (lambda group: group.update(coefficients=[1.0, 2.0]), "has not the 1 teachers"),
        (lambda group: group["samples"][0].update(factors=[1.0]), "has 1 values for its 3 tokens"),
        (lambda group: group["samples"][0].update(teacher=7), "teacher is 7: there are 1"),
        (lambda group: group["samples"][0].update(weight="0.1"), "weight is '0.1'"),
    ],
)
def test_a_batch_that_no_run_writes_is_refused(change, said, good, tmp_path, capsys):
    _, holds, _ = good["live"]
    groups = copy.deepcopy(holds["groups"])
    change(groups[0])
    torch.save({**holds, "groups": groups}, tmp_path / "failed-step-3.pt")
    assert main(["replay", str(tmp_path / "failed-step-3.pt")]) == 1
    assert said in capsys.readouterr().err


def test_a_group_without_teachers_has_no_coefficients_of_others(good, tmp_path, capsys):
    """A run writes that of one teacher, whatever the method; nobody reads it."""
    _, holds, _ = good["grpo of adapters"]
    groups = copy.deepcopy(holds["groups"])
    groups[0]["coefficients"] = [0.0] * 10**6
    torch.save({**holds, "groups": groups}, tmp_path / "failed-step-3.pt")
    assert main(["replay", str(tmp_path / "failed-step-3.pt")]) == 1
    assert "has not the 1 teachers of its config" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["groups", "samples", "rollout"])
def test_a_long_wrong_list_takes_little_memory(place, good, tmp_path, capsys):
    """pydantic alone makes an error of a kilobyte for each item."""
    _, holds, _ = good["live"]
    groups = copy.deepcopy(holds["groups"])
    wrong: list = [None] * 10**6
    if place == "groups":
        groups = wrong
    elif place == "samples":
        groups[0]["samples"] = wrong
    else:
        groups[0]["samples"][0]["rollout"] = wrong
    torch.save({**holds, "groups": groups}, tmp_path / "failed-step-3.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["replay", str(tmp_path / "failed-step-3.pt")]) == 1
    assert f"{place}.0 is None" in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("nest", ["in the config", "of one long text"])
def test_lists_that_share_what_they_hold_take_no_memory(nest, good, tmp_path, capsys):
    """A few hundred bytes, of which JSON would make 2^40 items."""
    _, holds, _ = good["live"]
    target = tmp_path / "failed-step-3.pt"
    changed = {
        "in the config": {"config": holds["config"] | {"prompts": {"student_chat": {"a": SHARED}}}},
        "of one long text": {"groups": ["a" * 10**5] * 10**5},
    }[nest]
    torch.save(holds | changed, target)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["replay", str(target)]) == 1
    assert "its lists repeat one another" in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
