"""launch/tpu.sh with a fake gcloud: its requests, and its handling of failures."""

import json
import math
import os
import shlex
import signal

import pytest

from tests.launch.conftest import COMPLETE, FAILS, HANGS, Cloud

NO_CAPACITY = 'ERROR: "message": "There is no more capacity in the zone \\"us-west4-a\\""'
REFUSED = "ssh: connect to host 10.0.0.2 port 22: Connection refused"
CREATE, SSH, DELETE = "queued-resources create", "queued-resources ssh", "queued-resources delete"


def test_topologies_have_gclouds_names(cloud: Cloud):
    table = [line.split() for line in cloud.run("tpu.sh", "topologies").stdout.splitlines()]
    names = {topology: name for topology, name, _ in table}
    assert names["v5e:4x4"] == "v5litepod-16"
    assert names["v5e:4x8"] == "v5litepod-32"
    assert names["v6e:4x4"] == "v6e-16"
    assert names["v5p:2x2x4"] == "v5p-32"
    assert names["v4:2x2x4"] == "v4-32"
    for topology, name, chips in table:
        generation, shape = topology.split(":")
        assert int(chips) == math.prod(map(int, shape.split("x")))
        cores = 2 if generation in ("v4", "v5p") else 1
        assert int(name.split("-")[1]) == cores * int(chips)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]),
        (["--topology=v5e:4x8"], ["--accelerator-type=v5litepod-32"]),
        (
            ["--topology=v6e:4x4"],
            ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"],
        ),
        (
            ["--topology=v5p:2x2x4", "--capacity=on-demand"],
            ["--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5"],
        ),
        (["--slices=2"], ["--accelerator-type=v5litepod-16", "--node-count=2"]),
    ],
)
def test_create_asks_for_the_slices(cloud: Cloud, flags: list[str], words: list[str]):
    assert cloud.tpu("create", *flags).returncode == 0
    (call,) = (call for call in cloud.calls if "create" in call)
    assert set(words) <= set(call)
    assert ("--spot" in call) == ("--capacity=on-demand" not in flags)
    assert (
        ("--node-id=ssrl" in call)
        == ("--node-prefix=ssrl" not in call)
        == ("--slices=2" not in flags)
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--topology=v5e:3x3"], "unknown topology v5e:3x3: give one of v5e:1x1 "),
        (["--capacity=cheap"], "unknown capacity cheap"),
        (["--slices=0"], "slices are counted from 1"),
        (["--zome=x"], "unknown flag --zome=x"),
        (["--config=configs/none.py"], "configs/none.py does not exist"),
        (["--project="], "PROJECT is not set"),
    ],
)
def test_wrong_settings_are_refused_before_any_request(cloud: Cloud, flags, says):
    done = cloud.tpu("create", *flags)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {says}") and done.stderr.count("\n") == 1
    assert not cloud.calls


def test_all_goes_from_nothing_to_the_model_and_leaves_no_tpu(cloud: Cloud):
    flags = ["--images=coco=/images", "--model=gs://b/runs/sft_3b/export"]
    flags += ["--config.grpo.steps=2", "--config.tasks.shuffle.kinds={'3x1': 1.0}"]
    plan = cloud.tpu("all", *flags, "--dry-run")
    assert plan.returncode == 0 and not cloud.calls

    done = cloud.tpu("all", *flags)
    assert done.returncode == 0, done.stderr
    assert (cloud.folder / "out/export/config.json").exists()
    assert (cloud.folder / "out/summary.json").exists()
    assert "in the bucket: step 100 of grpo (reward/overall_mean 0.25)" in done.stdout
    lines = (cloud.folder / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [99, 100]
    assert cloud.state is None and "is charged until" not in done.stdout
    assert "gs://b stays and is charged" in done.stdout
    calls = (cloud.folder / "python").read_text()
    assert "-m spatial_ssrl_jax.prepare coco /images gs://b/data" in calls
    assert (
        "-m spatial_ssrl_jax.train --config=configs/grpo_3b.py --workdir=gs://b/runs/grpo_3b "
        "--distributed --config.data.source=tfds:ssrl_pictures/coco@gs://b/data "
        "--config.model.path=gs://b/runs/sft_3b/export --config.grpo.steps=2 "
        "--config.tasks.shuffle.kinds={'3x1': 1.0}"
    ) in calls
    assert calls.count("spatial_ssrl_jax.train") == 2  # once a worker

    both = cloud.tpu("train", "--images=coco=/images diode=/depth", "--dry-run").stdout
    assert (
        "--config.data.source=tfds:ssrl_pictures/coco@gs://b/data"
        "+depth,position@tfds:ssrl_pictures/diode@gs://b/data"
    ) in both
    depth = cloud.tpu("train", "--images=diode=/depth nyu=/nyu", "--dry-run").stdout
    assert "position@" not in depth

    planned = [shlex.split(line)[1:] for line in plan.stdout.splitlines() if line[:6] == "gcloud"]
    optional = ("buckets create", "adapter", "storage cp /tmp")
    missing = [words for words in planned if words not in cloud.calls]
    assert all(any(name in " ".join(words) for name in optional) for words in missing)


@pytest.mark.parametrize("refusal", ["at once", "later"])
def test_no_capacity_is_tried_again_and_then_nothing_is_left(cloud: Cloud, refusal: str):
    if refusal == "at once":
        cloud.fault(CREATE, NO_CAPACITY, times=2)
    else:
        cloud.fault(CREATE, state="FAILED", code=0, times=2)
        cloud.fault("failedData", out=NO_CAPACITY, code=0, times=2)
    done = cloud.tpu("create")
    assert done.returncode == 1 and cloud.count(CREATE) == 2 and cloud.state is None
    assert "error: no capacity for v5litepod-16 in us-west4-a in 2 tries: try" in done.stderr
    assert "or later launch/tpu.sh create --project=p" in done.stderr
    assert "charged" not in done.stdout


def test_a_request_that_failed_for_capacity_is_replaced(cloud: Cloud):
    cloud.fault(CREATE, state="FAILED", code=0)
    cloud.fault("failedData", out=NO_CAPACITY, code=0)
    done = cloud.tpu("create")
    assert done.returncode == 0, done.stderr
    assert cloud.count(CREATE) == 2 and cloud.count(DELETE) == 1 and cloud.state == "ACTIVE"
    assert "ssrl (1 x v5litepod-16, spot) is charged until: launch/tpu.sh delete" in done.stdout


def test_any_other_refusal_stops_at_once(cloud: Cloud):
    cloud.fault(CREATE, "ERROR: RESOURCE_EXHAUSTED: Quota limit has been exceeded", times=9)
    done = cloud.tpu("create")
    assert done.returncode == 1 and cloud.count(CREATE) == 1
    assert "Quota limit has been exceeded" in done.stderr and "tpu.sh create" in done.stderr


def test_a_request_that_waits_is_named_when_patience_is_over(cloud: Cloud):
    cloud.start("WAITING_FOR_RESOURCES")
    done = cloud.tpu("create", "--patience=0", "--wait=1")
    assert done.returncode == 1 and cloud.count(CREATE) == 0
    assert "continue waiting with launch/tpu.sh create" in done.stderr
    assert "is charged once it is ACTIVE; cancel it: launch/tpu.sh delete" in done.stdout


def test_two_slices_are_one_machine(cloud: Cloud):
    cloud.start("ACTIVE")
    (cloud.folder / "chips").write_text("32\n")
    assert cloud.tpu("setup", "--slices=2").returncode == 0
    assert cloud.count("describe ssrl-0") == cloud.count("describe ssrl-1") == 1


def test_ssh_that_is_refused_for_a_while_is_tried_again(cloud: Cloud):
    cloud.start("ACTIVE")
    cloud.fault(SSH, REFUSED, code=255)
    done = cloud.tpu("setup")
    assert done.returncode == 0, done.stderr
    assert cloud.count(SSH) == 3  # refused, set up, checked


def test_ssh_that_stays_refused_stops_and_says_what_is_charged(cloud: Cloud):
    cloud.start("ACTIVE")
    cloud.fault(SSH, REFUSED, code=255, times=9)
    done = cloud.tpu("setup")
    assert done.returncode == 1 and cloud.count(SSH) == 2
    assert REFUSED in done.stderr and "launch/tpu.sh setup" in done.stderr
    assert "is charged until: launch/tpu.sh delete" in done.stdout


def test_a_worker_that_is_silent_is_missed(cloud: Cloud):
    """ssh to many workers may lose one and still exit with 0."""
    cloud.start("ACTIVE")
    cloud.fault(SSH, out="ok worker0 set up", code=0, times=9)
    done = cloud.tpu("setup")
    assert done.returncode == 1 and "not every worker of ssrl answers" in done.stderr


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("probe", "W: x\nerror: gs://b/probes/w cannot be used", "error: gs://b/probes/w cannot"),
        ("chips", "12", "sees 12 chips in place of 16"),
    ],
)
def test_a_worker_that_fails_says_why(cloud: Cloud, file: str, text: str, says: str):
    cloud.start("ACTIVE")
    (cloud.folder / file).write_text(text)
    done = cloud.tpu("setup")
    assert done.returncode == 1 and says in done.stdout
    assert "fix it, then run launch/tpu.sh setup" in done.stderr


def test_preemption_is_recognised_and_resumed(cloud: Cloud):
    cloud.training(HANGS)
    for verb in ("create", "setup", "train"):
        assert cloud.tpu(verb).returncode == 0
    cloud.fault("vm.sh status", REFUSED, code=255, state="SUSPENDED")
    done = cloud.tpu("watch")
    assert done.returncode == 75
    assert "ssrl was preempted or is gone: continue with launch/tpu.sh resume" in done.stderr
    assert "is SUSPENDED and holds no TPU" in done.stdout

    cloud.training(COMPLETE)
    assert cloud.tpu("resume").returncode == 0
    assert cloud.count(DELETE) == 1 and cloud.count(CREATE) == 2
    cloud.wait_for("step 1 of 2")
    assert cloud.tpu("watch").returncode == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_training_that_is_ended_from_outside_can_be_resumed(cloud: Cloud, how: int):
    cloud.training(HANGS)
    for verb in ("create", "setup", "train"):
        assert cloud.tpu(verb).returncode == 0
    cloud.wait_for("step 1 of 2")
    for pid in cloud.folder.glob("worker*/job/pid"):
        os.killpg(int(pid.read_text()), how)
    done = cloud.tpu("watch")
    assert done.returncode == 75 and "continue with launch/tpu.sh resume" in done.stderr


def test_a_node_that_is_preempted_before_the_request_says_so(cloud: Cloud):
    cloud.start("ACTIVE")
    cloud.fault(SSH, REFUSED, code=255, times=9)
    cloud.fault("tpu-vm describe ssrl-1 --project=p --zone=us-west4-a --format=value(state)",
                out="PREEMPTED", code=0, times=9)  # fmt: skip
    assert cloud.tpu("watch", "--slices=2").returncode == 75


def test_all_resumes_by_itself(cloud: Cloud):
    cloud.fault("vm.sh status", REFUSED, code=255, state="SUSPENDED")
    done = cloud.tpu("all")
    assert done.returncode == 0, done.stderr
    assert cloud.count(CREATE) == 2 and cloud.state is None


def test_training_that_fails_shows_its_log_and_what_is_charged(cloud: Cloud):
    cloud.training(FAILS)
    done = cloud.tpu("all")
    assert done.returncode == 1 and "error: out of memory" in done.stderr
    assert "training ended with an error (above): fix it, then run launch/tpu.sh" in done.stderr
    assert "is charged until: launch/tpu.sh delete" in done.stdout and cloud.state == "ACTIVE"


def test_a_second_start_changes_nothing_and_setup_lets_training_save(cloud: Cloud):
    cloud.training(HANGS)
    for verb in ("create", "setup", "train"):
        assert cloud.tpu(verb).returncode == 0
    cloud.wait_for("step 1 of 2")
    assert cloud.tpu("train").returncode == 0
    assert "every worker is training already" in cloud.tpu("resume").stdout
    other = cloud.tpu("train", "--config=configs/sft_3b.py")
    assert (
        other.returncode == 1 and "still training with --config=configs/grpo_3b.py" in other.stdout
    )
    assert (cloud.folder / "python").read_text().count("spatial_ssrl_jax.train") == 2
    assert cloud.tpu("setup").returncode == 0
    cloud.wait_for("saved")
    assert "nothing trains on ssrl" in cloud.tpu("watch").stderr


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"match": DELETE, "err": "ERROR: INTERNAL: try again", "times": 9}, "INTERNAL"),
        (
            {"match": "tpu-vm list", "out": "ssrl-1", "code": 0, "times": 9},
            "nodes are left: ssrl-1",
        ),
    ],
)
def test_a_deletion_that_fails_says_so(cloud: Cloud, fault: dict, says: str):
    cloud.start("ACTIVE")
    cloud.fault(**fault)
    done = cloud.tpu("delete")
    assert done.returncode == 1 and says in done.stderr
    assert "may still be charged: run launch/tpu.sh delete" in done.stderr


def test_a_deletion_is_tried_again(cloud: Cloud):
    cloud.start("ACTIVE")
    cloud.fault(DELETE, "ERROR: INTERNAL: try again")
    assert cloud.tpu("delete").returncode == 0 and cloud.state is None


def test_an_unknown_state_is_reported(cloud: Cloud):
    cloud.start("ACTIVE")
    cloud.fault("queued-resources describe", "ERROR: PERMISSION_DENIED: no", times=9)
    done = cloud.tpu("create")
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr
    assert "ssrl may exist and be charged (no state)" in done.stdout


def test_fetch_before_the_end_names_watch(cloud: Cloud):
    done = cloud.tpu("fetch")
    assert done.returncode == 1
    assert "export does not exist: check the progress with launch/tpu.sh watch" in done.stderr
