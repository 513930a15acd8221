"""Saved directories are whole, readable by those whom the umask lets, and known again."""

import json
import os
import stat
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from opsd.common.errors import UserError
from opsd.common.saved_directory import MANIFEST, _sealed, check_saved, new_directory


def filled(place):
    save_file({"a": torch.arange(8.0)}, place / "model.safetensors")
    (place / "config.json").write_text("{}")
    (place / "inside").mkdir()
    (place / "inside" / "part.bin").write_bytes(bytes(9))


@pytest.fixture
def saved(tmp_path):
    with new_directory(tmp_path / "model") as place:
        filled(place)
        assert not (tmp_path / "model").exists()
    return tmp_path / "model"


def test_a_directory_comes_whole_with_a_manifest_of_all_files(saved, tmp_path):
    names = {"model.safetensors", "config.json", "inside/part.bin"}
    assert set(check_saved(saved, "model.path")["files"]) == names
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (saved / "notes.txt").write_text("the user's own")
    check_saved(saved, "model.path")
    with new_directory(saved) as place:  # takes the place of the one before
        (place / "only").touch()
    assert set(check_saved(saved, "model.path")["files"]) == {"only"}


def test_all_of_it_is_on_disk_before_its_name(tmp_path, monkeypatch):
    synced = []
    here = "opsd.common.saved_directory"
    monkeypatch.setattr(f"{here}.sync", lambda path: synced.append(path.name))
    monkeypatch.setattr(f"{here}.move", lambda *_: synced.append("moved"))
    with new_directory(tmp_path / "model") as place:
        filled(place)
    assert {*synced[:-1]} == {"model.safetensors", "config.json", "part.bin", "inside"}
    assert synced[-1] == "moved"


def test_nothing_is_left_of_one_that_fails(saved, tmp_path):
    with pytest.raises(KeyboardInterrupt), new_directory(saved) as place:
        (place / "half").touch()
        raise KeyboardInterrupt
    check_saved(saved, "model.path")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_in_the_way_is_replaced(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "other")
    with new_directory(tmp_path / "model") as place:
        filled(place)
    assert not (tmp_path / "model").is_symlink() and not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read(umask, tmp_path):
    before = os.umask(umask)
    try:
        with new_directory(tmp_path / "model") as place:
            filled(place)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", flipped, "its SHA-256 differs"),
        ("model.safetensors", lambda f: f.write_bytes(bytes(f.stat().st_size)), "its SHA-256"),
        ("model.safetensors", lambda f: f.write_bytes(b""), "has 0 bytes, not"),
        ("model.safetensors", lambda f: os.truncate(f, 10**12), "has 1000000000000 bytes, not"),
        ("config.json", lambda f: f.unlink(), "is missing"),
        ("inside/part.bin", flipped, "its SHA-256 differs"),
        (MANIFEST, lambda f: f.write_bytes(f.read_bytes()[:50]), "is damaged"),
        (MANIFEST, lambda f: f.write_text('{"format": "opsd 1", "files": 7}'), "is damaged"),
        (MANIFEST, lambda f: f.write_text("[" * 10_000), "is damaged"),
    ],
)
def test_each_damage_is_named_by_its_file(name, damage, said, saved):
    damage(saved / name)
    with pytest.raises(UserError, match=said) as caught:
        check_saved(saved, "model.path")
    assert repr(str(saved / name)) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"../../etc/passwd": {"bytes": 1, "sha256": "00"}}, "passwd' is missing"),
        ({"config.json": 7}, "manifest.json' is damaged"),
        ({"config.json": {"bytes": 2}}, "manifest.json' is damaged"),
    ],
)
def test_a_manifest_leads_nowhere_else(entry, said, saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] |= entry
    (saved / MANIFEST).write_text(_sealed(manifest))
    with pytest.raises(UserError, match=said):
        check_saved(saved, "model.path")


def test_a_directory_without_a_manifest_of_ours_is_not_judged(tmp_path):
    assert check_saved(tmp_path, "model.path") is None
    (tmp_path / MANIFEST).write_text('{"name": "an app\'s"}')
    assert check_saved(tmp_path, "model.path") is None


def test_a_manifest_without_an_end_is_damaged(tmp_path):
    with new_directory(tmp_path / "a") as place:
        (place / "x").write_bytes(b"x")
    os.truncate(tmp_path / "a" / MANIFEST, 10**12)
    with pytest.raises(UserError, match=rf"{MANIFEST}' is damaged"):
        check_saved(tmp_path / "a", "f")


def test_each_bit_of_a_manifest_counts(tmp_path):
    """A number's last digit too, of which Python reads one digit or another as the same number."""
    with new_directory(tmp_path / "saved", {"base": [0.20000000298023224, 1.5]}) as directory:
        (directory / "a.txt").write_text("hi")
    file = tmp_path / "saved" / MANIFEST
    whole = file.read_bytes()
    for number in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[number // 8] ^= 1 << number % 8
        file.write_bytes(changed)
        with suppress(UserError):
            # Without the mark that it is ours there is nothing to judge: a run then refuses it.
            assert check_saved(tmp_path / "saved", "output.dir") is None, bytes(changed)
    file.write_bytes(whole)
    assert check_saved(tmp_path / "saved", "output.dir")["base"] == [0.20000000298023224, 1.5]
