"""Processes of one run: how they join, stop together, are lost, and continue as fewer."""

import argparse
import signal
import socket
import subprocess
from pathlib import Path

import jax
import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.common.errors import EXIT_PEER_LOST, UserError
from spatial_ssrl_jax.parallel.distributed import add_options, connect
from tests.helpers.processes import start_all, until
from tests.trainer.test_training import assert_same_run, finish, start, write_config

JOIN = """
import argparse, sys
import jax
from jax._src.clusters import cloud_tpu_cluster
from spatial_ssrl_jax.parallel.distributed import add_options, connect
cloud_tpu_cluster.running_in_cloud_tpu_vm = "tpu" in sys.argv  # JAX looks for the chips themselves
parser = argparse.ArgumentParser()
parser.add_argument("where")
add_options(parser)
connect(parser.parse_args(), 60)
print(jax.process_index(), jax.process_count(), jax.device_count(), jax.local_device_count())
"""


def job_of_a_free_port() -> int:
    """JAX makes a port of a SLURM job's number."""
    for number in range(4096):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 61440 + number)):
                return number
    raise AssertionError("no port is free")


def environment(where: str) -> dict[str, str]:
    """Variables of two processes as SLURM and two TPU slices of a host each set them."""
    if where == "slurm":
        names = {"JOB_ID": job_of_a_free_port(), "STEP_NODELIST": "localhost", "NTASKS": 2}
        names |= {"STEP_NUM_TASKS": 2, "PROCID": "{process}", "LOCALID": "{process}"}
        return {f"SLURM_{name}": str(value) for name, value in names.items()}
    return {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "{process}",
    }


@pytest.mark.parametrize("where", ["slurm", "tpu"])
def test_processes_join_as_their_environment_says(where: str):
    command = ["-c", JOIN, where, "--distributed"]
    processes = start_all(command, 2, devices=2, join=False, **environment(where))
    for number, process in enumerate(processes):
        out, errors = process.communicate(timeout=120)
        assert out.splitlines()[-1] == f"{number} 2 4 2", errors


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_STEP_NUM_TASKS", "4", "SLURM's step has 4 processes"),
        ("TPU_WORKER_HOSTNAMES", "a,b", "this TPU slice has 2 processes"),
    ],
)
def test_one_of_several_needs_an_option(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{message}.*give --distributed"):
        connect(options(), 60)


def test_a_process_alone_needs_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    connect(options(), 60)
    assert jax.process_count() == 1


def pair(config: Path, workdir: Path) -> list[subprocess.Popen]:
    command = ["-m", "spatial_ssrl_jax.train", f"--config={config}", f"--workdir={workdir}"]
    return start_all(command, 2)


def test_a_signal_to_one_of_two_stops_both_and_one_resumes(toy_config, whole: Path, tmp_path: Path):
    """Both save and exit with 0; a single process then ends as if it had been alone throughout."""
    config, run = write_config(tmp_path, toy_config(mesh=c.MeshSettings(fsdp=2))), tmp_path / "run"
    processes = pair(config, run)
    until(processes[0], "grpo 1/3")
    processes[1].send_signal(signal.SIGTERM)
    finish(*processes)
    assert not (run / "summary.json").exists()
    finish(start(config, run, 1, "--config.mesh.fsdp=1"))
    assert_same_run(run, whole)


@pytest.mark.slow
def test_eight_devices_then_four_then_one_change_nothing(toy_config, whole: Path, tmp_path: Path):
    mesh = c.MeshSettings(data=2, fsdp=2, tensor=2)
    config, run = write_config(tmp_path, toy_config(mesh=mesh)), tmp_path / "run"
    one = [f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "tensor")]
    for devices, line, more in ((8, "sft 1/2", []), (4, "grpo 1/3", one[:1]), (1, None, one)):
        process = start(config, run, devices, *more)
        if line:
            until(process, line)
            process.send_signal(signal.SIGTERM)
        finish(process)
    assert_same_run(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_training_ends_when_a_process_is_lost_and_resumes(
    toy_config, whole: Path, tmp_path: Path, number: int
):
    mesh = c.MeshSettings(fsdp=2, heartbeat_timeout=10)
    config, run = write_config(tmp_path, toy_config(mesh=mesh)), tmp_path / "run"
    processes = pair(config, run)
    until(processes[0], "grpo 1/3")
    processes[1].send_signal(number)
    _, errors = processes[0].communicate(timeout=60)
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == EXIT_PEER_LOST
    assert "the same command resumes after the newest checkpoint" in errors.splitlines()[-1]
    finish(*pair(config, run))
    assert_same_run(run, whole)
