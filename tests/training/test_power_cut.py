"""After a power cut the newest whole checkpoint is there, and the run goes on from it.

A run's calls of fsync, rename, unlink and the like are recorded. After each of them the machine
stops: what was not synced is lost, in two ways. Either the names are kept as the calls left them,
and contents that were not synced are empty; or the names are kept, too, only where their directory
was synced since.
"""

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import ROWS, quiet, short_config, timeless
from safetensors.torch import load_file

from opsd.models.load import load_model
from opsd.quickstart.worksheet import WorksheetGrader
from opsd.runs.directory import claim_directory, last_checkpoint, step_of
from opsd.training.checkpoints import Checkpoints
from opsd.training.run import run

STEPS = 3
CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


def go_on(files, directory):
    train = {"steps": STEPS, "save_every": 1, "save_total_limit": 1}
    config = short_config(*files, directory, train=train, eval={"problems": 0})
    checkpoint = claim_directory(directory, config, True)
    model, tokenizer = load_model(config.model)
    torch.manual_seed(0)
    rows, grader = ROWS[:12], WorksheetGrader()
    run(config, model, tokenizer, rows, [], grader, quiet(), checkpoint=checkpoint)


class Disk:
    """What would be left of a directory after each call, and how much had been promised then."""

    def __init__(self, root: Path):
        self.root, self.promised, self.calls = root, 0, []
        self.contents = {}  # inode → what was synced of the file
        self.names = {}  # inode → what was synced of the directory
        self.open, self.lock = [], threading.RLock()  # open, so that no inode comes again
        self.states = []  # (call, step that was promised, names kept, names lost)

    def record(self, name, call, *arguments, **more):
        with self.lock:
            result = call(*arguments, **more)
            if name == "fsync":
                self.synced(arguments[0])
            if self.root.is_dir():
                self.states.append((name, self.promised, self.kept(self.root), self.lost()))
            return result

    def synced(self, file):
        found = os.fstat(file)
        self.open.append(os.dup(file))
        if stat.S_ISDIR(found.st_mode):
            entries = list(os.scandir(file))
            self.names[found.st_ino] = {e.name: (e.inode(), e.is_dir()) for e in entries}
        else:
            path = Path(os.readlink(f"/proc/self/fd/{file}"))
            self.contents[found.st_ino] = path.read_bytes()

    def kept(self, place):
        return {
            e.name: self.kept(e.path) if e.is_dir() else self.contents.get(e.inode(), b"")
            for e in os.scandir(place)
        }

    def lost(self, inode=None):
        names = self.names.get(inode or self.root.stat().st_ino, {})
        return {
            name: self.lost(inode) if is_directory else self.contents.get(inode, b"")
            for name, (inode, is_directory) in names.items()
        }


def restored(tree, place):
    place.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            restored(content, place / name)
        else:
            (place / name).write_bytes(content)


@pytest.fixture(scope="module")
def recorded(files, tmp_path_factory):
    """A run that keeps one checkpoint, and its states."""
    root = tmp_path_factory.mktemp("disk") / "run"
    disk, write = Disk(root), Checkpoints.write

    def promising(self, state, ahead):
        write(self, state, ahead)
        disk.promised = state.global_step

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            real = getattr(os, name)
            patch.setattr(os, name, lambda *a, n=name, r=real, **k: disk.record(n, r, *a, **k))
        patch.setattr(Checkpoints, "write", promising)
        go_on(files, root)
    for file in disk.open:
        os.close(file)
    return disk


def test_after_each_call_the_newest_whole_checkpoint_is_there(files, recorded, tmp_path):
    """And from two of them the run goes on to the same end: all are known by their SHA-256."""
    known, points, tried = {}, recorded.states, {}
    assert len(points) > 60 and {name for name, *_ in points} >= {"fsync", "replace", "unlink"}
    for number, (name, promised, *trees) in enumerate(points):
        for kind, tree in zip(("names kept", "names lost"), trees, strict=True):
            if tried.get(kind) == (promised, tree):
                continue  # the call has changed nothing
            tried[kind], place = (promised, tree), tmp_path / "run"
            restored(tree, place)
            found = step_of(last_checkpoint(place))
            assert found >= promised, f"{kind} after call {number}, {name}: {found}"
            if found:
                assert [line["step"] for line in read_lines(place / "metrics.jsonl")][:found] == [
                    *range(1, found + 1)
                ]
                known.setdefault(found, tree)
            shutil.rmtree(place)
    assert set(known) == {*range(1, STEPS + 1)}
    for step in (1, 2):
        go_on_from(files, known[step], tmp_path / f"from-{step}", recorded.root)


def go_on_from(files, tree, place, whole):
    restored(tree, place)
    go_on(files, place)
    lines = [timeless(read_lines(of / "metrics.jsonl")) for of in (place, whole)]
    assert len(lines[0]) == STEPS and lines[0] == lines[1]
    weights = [load_file(of / "model" / "model.safetensors") for of in (place, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_disk_without_fsync_would_be_noticed(recorded, tmp_path):
    """The proof can fail: were nothing synced, no checkpoint would be left."""
    disk = Disk(recorded.root)
    restored(disk.kept(recorded.root), tmp_path / "run")
    with pytest.raises(Exception, match="checkpoint"):
        last_checkpoint(tmp_path / "run")
