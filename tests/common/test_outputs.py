"""Folders that commands fill: which are refused, what stays in them, and filling one atomically."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.outputs import (
    MARKER,
    atomic_folder,
    check_output_folder,
    claim_output_folder,
)
from spatial_ssrl_jax.common.paths import LOCK, user_path, write_atomic
from tests.helpers.fake_storage import Storage


def content(folder: Path) -> dict[str, str]:
    """The files below a folder but for marker and lock."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in (MARKER, LOCK)]
    return {str(p.relative_to(folder)): p.read_text() for p in paths}


def fill(folder: Path, **files: str) -> None:
    with atomic_folder(folder, overwrite=True) as partial:
        for name, text in files.items():
            (partial / name).write_text(text)


def test_an_absent_or_empty_folder_is_free(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        claim_output_folder(tmp_path / name, overwrite=False)
        assert os.listdir(tmp_path / name) == [MARKER]
        claim_output_folder(tmp_path / name, overwrite=False)  # still empty


@pytest.mark.parametrize("names", [["lost+found"], [LOCK, ".new.partial"]])
def test_what_a_disk_and_an_interrupted_command_leave_is_no_content(tmp_path: Path, names: list):
    for name in names:
        (tmp_path / name).mkdir()
    claim_output_folder(tmp_path, overwrite=False)
    assert set(os.listdir(tmp_path)) == {MARKER, *names} - {".new.partial"}


def test_ours_is_emptied_only_with_overwrite_and_stays(tmp_path: Path):
    fill(tmp_path / "out", **{"a.txt": "ours", "config.json": "{}"})
    kept = (tmp_path / "out").stat().st_ino
    with pytest.raises(UserError, match="out is not empty: .*--overwrite"):
        claim_output_folder(tmp_path / "out", overwrite=False)
    assert len(content(tmp_path / "out")) == 2
    claim_output_folder(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == {} and (tmp_path / "out").stat().st_ino == kept


def test_the_run_of_an_early_version_is_ours(tmp_path: Path):
    (tmp_path / "checkpoints" / "model").mkdir(parents=True)
    (tmp_path / "config.json").touch()
    claim_output_folder(tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == [MARKER]


def test_a_folder_of_others_is_never_emptied(tmp_path: Path):
    (tmp_path / "photo.jpg").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="was not written by this package: .*or empty it") as e:
            claim_output_folder(tmp_path, overwrite)
        assert "--overwrite" not in str(e.value)
    assert content(tmp_path) == {"photo.jpg": "mine"}


@pytest.mark.parametrize("place", ["here", "parent", "home"])
def test_home_and_the_working_folder_are_never_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    fill(tmp_path, **{"a.txt": "mine"})
    (tmp_path / "below").mkdir()
    elsewhere = tmp_path.parent
    monkeypatch.chdir({"here": tmp_path, "parent": tmp_path / "below"}.get(place, elsewhere))
    monkeypatch.setenv("HOME", str(tmp_path if place == "home" else elsewhere))
    with pytest.raises(UserError, match="is never emptied: choose another folder"):
        claim_output_folder(tmp_path, True)
    assert content(tmp_path) == {"a.txt": "mine"}


@pytest.mark.parametrize("inside", [".", "images", "link"])
def test_what_is_read_is_never_removed(tmp_path: Path, inside: str):
    out = tmp_path / "out"
    fill(out, **{"a.txt": "ours"})
    (out / "images").mkdir()
    (tmp_path / "link").symlink_to(out / "images")
    path = tmp_path / "link" if inside == "link" else out / inside
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds what is read") as caught:
            claim_output_folder(out, overwrite, path)
        assert "--overwrite" not in str(caught.value)
    assert content(out) == {"a.txt": "ours"}


def test_a_link_inside_is_removed_and_not_what_it_points_to(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    fill(tmp_path / "out", **{"a.txt": "ours"})
    (tmp_path / "out" / "photos").symlink_to(tmp_path / "photos")
    claim_output_folder(tmp_path / "out", True)
    assert content(tmp_path / "out") == {}
    assert content(tmp_path / "photos") == {"a.jpg": "mine"}


def test_a_link_to_a_folder_is_filled_and_one_to_nothing_named(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    fill(tmp_path / "link", **{"a.txt": "ours"})
    assert content(tmp_path / "real") == {"a.txt": "ours"} and (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("nothing", "nothing/below", "loop"):
        with pytest.raises(UserError, match="is a link to nothing: make its target"):
            check_output_folder(tmp_path / name, False)


def test_what_cannot_be_written_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file\): choose another folder"):
        check_output_folder(tmp_path / "file" / "out", False)
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    with pytest.raises(UserError, match=r"is not writable\): choose another folder"):
        check_output_folder(tmp_path / "out", False)


def test_nothing_is_made_outside_the_folder(tmp_path: Path):
    """Its parent may be read-only, or on another disk: an empty folder is filled where it is."""
    out = tmp_path / "parent" / "out"
    out.mkdir(parents=True)
    before = (tmp_path / "parent").stat().st_mtime_ns
    fill(out, **{"a.txt": "ours"})
    fill(out, **{"b.txt": "ours"})
    assert content(out) == {"b.txt": "ours"} and os.listdir(tmp_path / "parent") == ["out"]
    assert (tmp_path / "parent").stat().st_mtime_ns == before


def test_an_error_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path / "out", **{"config.json": "old", "a": "old"})
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "out", True) as partial:
        (partial / "config.json").write_text("new")
        raise OSError("full")
    assert content(tmp_path / "out") == {"config.json": "old", "a": "old"}
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out" / "b":
            raise OSError("full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="full"):
        fill(tmp_path / "out", **{"config.json": "new", "a": "new", "b": "new"})
    assert content(tmp_path / "out") == {"config.json": "old", "a": "old"}


def test_a_folder_that_was_filled_meanwhile_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="out is not empty"):
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "a").write_text("first")
        with atomic_folder(tmp_path / "out"):
            pass
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("mine")
    with (
        pytest.raises(UserError, match="not written by this package"),
        atomic_folder(tmp_path / "theirs", overwrite=True),
    ):
        pass


def test_a_folder_kept_up_to_date_keeps_what_is_others(tmp_path: Path):
    fill(tmp_path / "out", **{"a.safetensors": "old", "b.safetensors": "old", "notes": "mine"})
    ours = lambda name: name.endswith(".safetensors")  # noqa: E731
    with atomic_folder(tmp_path / "out", replaces=ours) as partial:
        (partial / "a.safetensors").write_text("new")
    assert content(tmp_path / "out") == {"a.safetensors": "new", "notes": "mine"}


def test_a_folder_is_the_same_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder that is mounted twice has one device and inode under two names."""
    fill(tmp_path / "out", **{"a.txt": "ours"})
    (tmp_path / "mounted").mkdir()
    samefile = os.path.samefile

    def mounted(a, b) -> bool:
        swap = lambda p: str(p).replace("mounted", "out")  # noqa: E731
        return samefile(swap(a), swap(b))

    monkeypatch.setattr(os.path, "samefile", mounted)
    with pytest.raises(UserError, match="holds what is read"):
        claim_output_folder(tmp_path / "out", True, tmp_path / "mounted")


KILLED = """
import os, sys
from spatial_ssrl_jax.common.outputs import atomic_folder
with atomic_folder(sys.argv[1]) as partial:
    (partial / "model.safetensors").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_command_leaves_is_removed_by_the_next(tmp_path: Path):
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, out], check=False).returncode == -9
    assert content(out) == {".new.partial/model.safetensors": "half"}
    check_output_folder(out, False)
    fill(out, **{"config.json": "new"})
    assert content(out) == {"config.json": "new"} and set(os.listdir(tmp_path)) == {"out"}


def test_files_have_the_mode_of_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "a").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o640


def test_files_reach_the_disk_before_they_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda _: done.append("sync"))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("name") or replace(a, b))
    write_atomic(tmp_path / "out" / MARKER, "x")
    assert done == ["sync", "name"]
    done.clear()
    fill(tmp_path / "out", **{"a": "x", "b": "y"})
    assert done == ["sync"] * 3 + ["name"] * 2 + ["sync"]


def test_a_folder_in_a_bucket_is_replaced_and_config_comes_last(bucket: Storage):
    folder = user_path("gs://bucket/run/export")
    for names in (["config.json", "old"], ["a/b", "config.json", "model.safetensors"]):
        with atomic_folder(folder, overwrite=True) as local:
            for name in names:
                (local / name).parent.mkdir(exist_ok=True)
                (local / name).write_text(name)
    found = [f"run/export/{name}" for name in [MARKER, *names]]
    assert bucket.names("bucket") == found
    assert bucket.read("bucket", "run/export/a/b") == b"a/b"
    assert "config.json" in [line for line in bucket.asked if "uploadType" in line][-2]
    with pytest.raises(OSError, match="full"), atomic_folder(folder, True) as local:
        (local / "half").write_text("x")
        raise OSError("full")
    assert bucket.names("bucket") == found


def test_a_folder_in_a_bucket_is_replaced_only_with_overwrite(bucket: Storage):
    folder = user_path("gs://bucket/run")
    check_output_folder(folder, False)
    claim_output_folder(folder, False)
    write_atomic(folder / "a.txt", "mine")
    bucket.write("bucket", "running/a.txt", b"another's")
    with pytest.raises(UserError, match="gs://bucket/run is not empty.*--overwrite"):
        check_output_folder(folder, False)
    with pytest.raises(UserError, match="holds what is read"):
        claim_output_folder(folder, True, folder / "export")
    claim_output_folder(folder, True)
    assert bucket.names("bucket") == [f"run/{MARKER}", "running/a.txt"]
    bucket.buckets["bucket"].pop(f"run/{MARKER}")
    write_atomic(folder / "a.txt", "mine")
    with pytest.raises(UserError, match="gs://bucket/run is not empty, and was not written by"):
        claim_output_folder(folder, True)
