"""A run whose folder is `gs://…`: what it leaves there, a kill in a save, and what refuses it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax import convert
from spatial_ssrl_jax.checkpoint.checksums import find_damage
from spatial_ssrl_jax.checkpoint.manager import Checkpoints, set_aside_damaged
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.paths import user_path
from spatial_ssrl_jax.monitoring.metrics import MetricsWriter, read_metrics
from spatial_ssrl_jax.trainer.initial_state import check_initial_weights
from spatial_ssrl_jax.trainer.preflight import preflight
from spatial_ssrl_jax.trainer.training import train
from tests.checkpoint.test_manager import assert_same, state
from tests.helpers.fake_storage import Storage
from tests.trainer.test_training import figures, finish, start, write_config

pytestmark = pytest.mark.usefixtures("reward_by_length")

COMMIT = "run/checkpoints/3/commit_success.txt"


@pytest.fixture(scope="module")
def run(lora_config: c.Config, storage: Storage) -> dict:
    """The bucket's files after a run that was refused at the end of the save of step 3, and went
    on."""
    storage.faults.append([f"uploadType {COMMIT}", 403, 1])
    with pytest.raises(UserError, match=r"step 3 could not be saved.*resumes after step 2"):
        train(lora_config, "gs://bucket/run")
    assert storage.names("bucket", "run/checkpoints/3/training/")
    assert train(lora_config, "gs://bucket/run")
    return dict(storage.buckets["bucket"])


@pytest.fixture
def left(run: dict, bucket: Storage) -> Storage:
    """The bucket as that run left it."""
    bucket.buckets["bucket"].update(run)
    return bucket


def assert_as_local(bucket: Storage, lora_run: Path) -> None:
    assert figures(user_path("gs://bucket/run")) == figures(lora_run)
    for name in ("export/model.safetensors", "adapter/adapter_model.safetensors"):
        assert bucket.read("bucket", f"run/{name}") == (lora_run / name).read_bytes()
    ours, theirs = (
        bucket.read("bucket", "run/summary.json"),
        (lora_run / "summary.json").read_text(),
    )
    assert json.loads(ours)["heldout"] == json.loads(theirs)["heldout"]


def test_it_ends_as_a_run_in_a_folder(left: Storage, lora_run: Path):
    assert_as_local(left, lora_run)


@pytest.mark.slow
def test_a_kill_in_a_save_changes_nothing(bucket: Storage, lora_config: c.Config, tmp_path: Path):
    path, process = write_config(tmp_path, lora_config), None

    def kill(line: str) -> None:
        if "upload" in line and COMMIT in line:
            process.kill()

    bucket.watch = kill
    process = start(path, "gs://bucket/run", 1)
    out, err = process.communicate(timeout=600)
    bucket.watch = lambda _: None
    assert process.returncode == -9, out + err
    bucket.buckets["bucket"].pop(COMMIT, None)
    assert bucket.names("bucket", "run/checkpoints/3/training/")
    finish(start(path, "gs://bucket/run", 1), start(path, tmp_path / "run", 1))
    assert_as_local(bucket, tmp_path / "run")


def test_it_leaves_what_a_run_in_a_folder_leaves(left: Storage, lora_run: Path):
    def kinds(names) -> set[str]:
        """Names without checkpoints' insides and without what tells starts apart."""
        names = {n for n in names if not n.startswith("checkpoints") or n.count("/") < 2}
        return {n.split(".out.")[0] for n in names} - {"metrics/part_000001.jsonl", "metrics.jsonl"}

    files = [str(p.relative_to(lora_run)) for p in lora_run.rglob("*") if p.is_file()]
    names = [name.removeprefix("run/") for name in left.names("bucket")]
    assert kinds(names) == kinds(files)
    steps = {name.split("/")[1] for name in names if name.startswith("checkpoints")}
    assert steps == {"model", "frozen_sft", "frozen_grpo", *"1234"}
    report = left.read("bucket", "run/report.html").decode()
    assert report.count("<article") == 4 and "data:image/jpeg" in report


def test_tensorboard_gets_the_figures_of_each_start(left: Storage):
    starts = []
    for name in left.names("bucket", "run/events.out.tfevents."):
        data, steps = left.read("bucket", name), set()
        while data:
            size = int.from_bytes(data[:8], "little")
            steps.add(Event.FromString(data[12 : 12 + size]).step)
            data = data[16 + size :]
        starts.append(steps)
    assert starts == [{0, 1, 2, 3, 4}, {0, 3, 4}]  # 0: the file's first record


def test_check_counts_on_from_there_and_writes_nothing(left: Storage, lora_config: c.Config):
    before = left.names("bucket")
    longer = dataclasses.replace(lora_config, grpo=dataclasses.replace(lora_config.grpo, steps=5))
    found = preflight(longer, "gs://bucket/run")
    assert found["steps_done"] == 4 and found["stages"]["grpo"]["steps_left"] == 3
    assert found["disk"]["free_bytes"] is None and found["disk"]["there_bytes"] > 10_000
    assert found["problems"] == [] and left.names("bucket") == before
    other = dataclasses.replace(lora_config, seed=3)
    with pytest.raises(UserError, match=r"gs://bucket/run holds a run with another.*seed changed"):
        preflight(other, "gs://bucket/run")


def bits(path: str) -> list[bytes]:
    from spatial_ssrl_jax.parallel.mesh import make_mesh
    from spatial_ssrl_jax.parallel.sharding import Layout

    params = open_model(path).load(Layout(make_mesh(c.MeshSettings())), "float32")
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]


def test_models_are_read_from_there_and_converted_to_there(
    left: Storage, lora_run: Path, lora_config: c.Config, capsys: pytest.CaptureFixture
):
    wanted = bits(str(lora_run / "export"))
    for place in ("export", "checkpoints/4"):
        assert bits(f"gs://bucket/run/{place}") == wanted
        grpo = dataclasses.replace(lora_config.grpo, init_from=f"gs://bucket/run/{place}")
        no_start = dataclasses.replace(lora_config.sft, steps=0)
        check_initial_weights(
            dataclasses.replace(lora_config, sft=no_start, grpo=grpo),
            open_model(lora_config.model.path),
        )
    convert.main(["to-orbax", "gs://bucket/run/export", "gs://bucket/orbax"])
    convert.main(["to-hf", "gs://bucket/orbax", "gs://bucket/again"])
    merge = ["gs://bucket/run/checkpoints/2", "gs://bucket/run/adapter", "gs://bucket/merged"]
    convert.main(["merge-lora", *merge])
    assert bits("gs://bucket/orbax") == wanted
    for name in ("again", "merged"):
        file = left.read("bucket", f"{name}/model.safetensors")
        assert file == (lora_run / "export" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="gs://bucket/none does not exist"):
        open_model("gs://bucket/none")
    with pytest.raises(UserError, match="gs://bucket/again is not empty"):
        convert.main(["to-hf", "gs://bucket/orbax", "gs://bucket/again"])


def test_a_damaged_checkpoint_is_passed_over_and_an_unfinished_one_goes(bucket: Storage):
    folder = user_path("gs://bucket/c")
    checkpoints = Checkpoints(folder, keep=3)
    for step in (3, 6, 9):
        checkpoints.save(step, "sft", state(step, frozen=True), {"step": step})
    checkpoints.wait()
    checkpoints.close()
    names = bucket.names("bucket", "c/6/params/")
    largest = max(names, key=lambda name: len(bucket.read("bucket", name)))
    data = bucket.buckets["bucket"].pop(largest).data
    assert find_damage(folder / "6") == f"{largest.removeprefix('c/6/')} is missing"
    bucket.write("bucket", largest, data[:-1])
    assert find_damage(folder / "6").endswith("was truncated or grew")
    bucket.write("bucket", largest, bytes([data[0] ^ 1]) + data[1:])
    del bucket.buckets["bucket"]["c/9/commit_success.txt"]
    del bucket.buckets["bucket"]["c/frozen_sft/commit_success.txt"]
    messages = []
    set_aside_damaged(folder, messages.append)
    assert len(messages) == 1 and "step 6" in messages[0] and "was altered" in messages[0]
    assert bucket.names("bucket", "c/damaged_6/") and not bucket.names("bucket", "c/9/")
    again = Checkpoints(folder, keep=3)
    assert again.latest() == 3
    again.save(9, "sft", state(9, frozen=True), {})
    again.wait()
    assert_same(again.restore(9, state(0, frozen=True))[0], state(9, frozen=True))
    again.close()


def test_metrics_are_in_parts_and_a_resume_truncates_them(bucket: Storage):
    for steps, resume in ((range(96, 106), 0), (range(103, 105), 102)):
        writer = MetricsWriter("gs://bucket/m", resume)
        for step in steps:
            writer.write("sft", step, {"loss/sft": 1.0 / step})
        writer.close()
    assert [row["step"] for row in read_metrics("gs://bucket/m")] == [*range(96, 105)]
    assert bucket.names("bucket", "m/metrics/") == [
        "m/metrics/part_000001.jsonl",
        "m/metrics/part_000002.jsonl",
    ]


def test_a_permission_lost_during_a_run_is_reported(bucket: Storage):
    writer = MetricsWriter("gs://bucket/m")
    checkpoints = Checkpoints(user_path("gs://bucket/c"), keep=2)
    checkpoints.save(3, "sft", state(3), {})
    checkpoints.wait()
    bucket.denied.add("storage.objects.create")
    with pytest.raises(UserError, match=r"step 4 could not .*objects\.create access\): grant"):
        writer.write("sft", 4, {"loss/sft": 1.0})
    says = r"step 4 could not be saved .*objects\.create access\): grant .* resumes after step 3"
    with pytest.raises(UserError, match=says):
        checkpoints.save(4, "sft", state(4), {})
        checkpoints.wait()


def test_a_run_that_may_not_write_is_refused_before_it_begins(
    bucket: Storage, lora_config: c.Config
):
    bucket.denied.add("storage.objects.create")
    with pytest.raises(UserError, match=r"without the permission storage\.objects\.create"):
        train(lora_config, "gs://bucket/run")
    # A save that an earlier test made fail may still write into its own folder.
    assert not [name for name in bucket.names("bucket") if name.startswith("run")]
