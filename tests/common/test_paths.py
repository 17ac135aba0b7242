"""Files and folders here and in a bucket: written, listed, copied, and what a bucket refuses."""

import sys
from pathlib import Path

import pytest
from etils import epath

from spatial_ssrl_jax.common.errors import UserError, explain
from spatial_ssrl_jax.common.paths import (
    check_bucket,
    list_tree,
    local_copy,
    read_files,
    user_path,
    write_atomic,
)
from tests.helpers.fake_storage import Storage


@pytest.mark.parametrize("place", ["gs://bucket", "gs://bucket/", "s3://bucket/run", "gs://b/run"])
def test_what_is_no_folder_of_a_bucket_is_named(place: str):
    with pytest.raises(UserError, match=f"{place} is no folder in a bucket"):
        user_path(place)


def test_a_bucket_without_its_extra_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://bucket/run: gs:// needs the extra \[gcs\]"):
        user_path("gs://bucket/run")


def test_files_are_written_whole_read_together_and_listed(bucket: Storage):
    folder = user_path("gs://bucket/run")
    assert list_tree(folder) == {}
    for number in range(40):
        write_atomic(folder / "metrics" / f"{number}.jsonl", f"line {number}")
    write_atomic(folder / "metrics" / "7.jsonl", "again")
    data = read_files(folder / "metrics" / f"{n}.jsonl" for n in range(40))
    assert data[7] == b"again" and data[39] == b"line 39"
    before = list_tree(folder)
    assert len(before) == 40 and before["metrics/7.jsonl"][0] == 5
    bucket.write("bucket", "run/metrics/7.jsonl", b"other")  # as another process does
    after = list_tree(folder)
    assert [name for name in after if after[name] != before[name]] == ["metrics/7.jsonl"]


def test_a_folder_in_a_bucket_is_fetched_once(bucket: Storage):
    for name in ("config.json", "model.safetensors", "checkpoints/3/x"):
        bucket.write("bucket", f"hf/{name}", name.encode() * 999_999)
    local = local_copy(user_path("gs://bucket/hf"))
    assert sorted(path.name for path in local.iterdir()) == ["config.json", "model.safetensors"]
    assert (local / "model.safetensors").read_bytes() == b"model.safetensors" * 999_999
    bucket.asked.clear()
    assert local_copy(user_path("gs://bucket/hf")) == local and bucket.asked == []
    assert str(local).endswith("bucket/hf")
    with pytest.raises(UserError, match="gs://bucket/none does not exist"):
        local_copy(user_path("gs://bucket/none"))


CAUSES = [
    ("storage.buckets.get", r"storage\.buckets\.get access\): grant .*legacyBucketReader"),
    ("storage.objects.create", r"without the permission storage\.objects\.create\): grant"),
    ("storage.objects.delete", r"without the permission storage\.objects\.delete\): grant"),
    ("storage.objects.get", r"storage\.objects\.get access\): grant"),
]


@pytest.mark.parametrize(("denied", "says"), CAUSES)
def test_a_permission_that_is_missing_is_named(bucket: Storage, denied: str, says: str):
    folder = user_path("gs://bucket/run")
    check_bucket(folder)
    assert bucket.names("bucket") == []
    bucket.denied.add(denied)
    with pytest.raises(UserError, match=f"gs://bucket/run cannot be used .*{says}"):
        check_bucket(folder)


def test_a_bucket_that_is_missing_or_down_is_named(
    bucket: Storage, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="no such bucket or file.*check the name, or create"):
        check_bucket(user_path("gs://another/run"))
    monkeypatch.setattr("spatial_ssrl_jax.common.paths._SECONDS", 0.1)
    bucket.faults.append(["/b/bucket", 503, 99])
    with pytest.raises(UserError, match=r"cannot be used \(Timeout.*check the network"):
        check_bucket(user_path("gs://bucket/run"))


def test_without_credentials_the_next_step_is_named(
    bucket: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")  # which needs none
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    with pytest.raises(UserError, match="no valid credentials.*gcloud auth application-default"):
        check_bucket(user_path("gs://bucket/run"))


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (403, "the bucket cannot be used (permission denied): grant roles/storage.objectAdmin"),
        (401, "the bucket cannot be used (no valid credentials): run gcloud auth"),
    ],
)
def test_any_command_says_what_a_bucket_answers(bucket: Storage, status: int, says: str):
    path = user_path("gs://bucket/run") / "a.txt"
    for use in (path.read_text, lambda: write_atomic(path, "x"), path.exists):
        bucket.faults[:] = [["run/a.txt", status, 9], ["prefix=run/a.txt", status, 9]]
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - whatever gcsfs raises
            use()
        assert explain(caught.value).startswith(says), caught.value


def test_a_local_error_is_not_taken_for_a_buckets(tmp_path: Path):
    for error in (FileNotFoundError("Checkpoint not found at x"), ValueError("404"), OSError("x")):
        assert explain(error) is None
    with pytest.raises(FileNotFoundError) as caught:
        epath.Path(tmp_path / "none").read_text()
    assert explain(caught.value).startswith(f"{tmp_path / 'none'}: No such file or directory")
