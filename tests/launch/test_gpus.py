"""launch/gpu.sh and launch/slurm.sbatch with fakes, and ShellCheck over all scripts."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import PYTHON, ROOT, Cloud, write_script


@pytest.fixture
def venv(cloud: Cloud) -> Path:
    """An environment whose Python only records its arguments."""
    cloud.training("")
    write_script(cloud.folder / "venv/bin/python", PYTHON)
    return cloud.folder / "venv"


def test_gpu_trains_where_jax_sees_the_gpus(cloud: Cloud, venv: Path):
    write_script(cloud.folder / "bin/nvidia-smi", "#!/bin/sh\n")
    words = [f"--venv={venv}", "--config=configs/tiny.py", "--source=folder:p", "--config.seed=3"]
    done = cloud.run("gpu.sh", *words)
    assert done.returncode == 0, done.stderr
    last = (cloud.folder / "python").read_text().splitlines()[-1]
    assert last == (
        "-m spatial_ssrl_jax.train --config=configs/tiny.py --workdir=runs/tiny "
        "--config.data.source=folder:p --config.seed=3"
    )
    plan = cloud.run("gpu.sh", *words, "--dry-run")
    assert plan.stdout.splitlines()[-1] == f"{venv}/bin/python {last}"


def test_gpu_names_the_command_that_makes_a_missing_cold_start(cloud: Cloud, venv: Path):
    words = ["gpu.sh", f"--venv={venv}", "--config=configs/grpo_7b.py"]
    missing = cloud.run(*words)
    assert missing.returncode == 1 and missing.stderr == (
        "error: configs/grpo_7b.py starts from runs/sft_7b/export, which is not there: make it "
        "with launch/gpu.sh --config=configs/sft_7b.py, or give --model=FOLDER.\n"
    )
    words[2] = f"--config={ROOT}/configs/grpo_7b.py"
    other = cloud.run(*words, "--source=folder:p").stderr
    assert "launch/gpu.sh --config=configs/sft_7b.py --source=folder:p, or give" in other
    assert cloud.run(*words, "--dry-run").returncode == 0
    for word in ("--model=m", "--config.model.path=m", "--config.grpo.init_from=m"):
        assert "sft_7b" not in cloud.run(*words, word).stderr
    alone = cloud.run("gpu.sh", f"--venv={venv}", "--config=configs/grpo_3b_lora.py", "--dry-run")
    assert alone.returncode == 0


def test_gpu_stops_without_a_driver_before_it_installs(cloud: Cloud):
    write_script(cloud.folder / "bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
    done = cloud.run("gpu.sh", f"--venv={cloud.folder / 'new'}", "--config=configs/tiny.py")
    assert done.returncode == 1 and done.stderr.startswith("error: no NVIDIA driver answers")
    assert not (cloud.folder / "new").exists()


def test_slurm_trains_on_every_task_and_queues_again_until_complete(cloud: Cloud, venv: Path):
    notes = cloud.folder / "notes"
    for name in ("srun", "scontrol"):
        write_script(cloud.folder / f"bin/{name}", f'#!/bin/sh\necho {name} "$@" >>{notes}\n')
    shutil.copytree(ROOT / "launch", cloud.folder / "launch")
    (cloud.folder / "configs").mkdir()
    (cloud.folder / "configs/x.py").touch()
    copied = cloud.folder / "spool/slurm_script"
    write_script(copied, (ROOT / "launch/slurm.sbatch").read_text())

    def submit() -> subprocess.CompletedProcess[str]:
        env = f"SLURM_SUBMIT_DIR={cloud.folder} SLURM_JOB_ID=7 PATH={cloud.folder / 'bin'}:$PATH"
        command = f"{env} bash {copied} --config=configs/x.py --venv={venv}"
        return subprocess.run(command, shell=True, capture_output=True, text=True)

    assert submit().returncode == 0
    train, again = notes.read_text().splitlines()
    assert train == (
        f"srun --kill-on-bad-exit=1 {venv}/bin/python -m spatial_ssrl_jax.train "
        "--config=configs/x.py --workdir=runs/x --distributed"
    )
    assert again == "scontrol requeue 7"

    (cloud.folder / "runs/x").mkdir(parents=True)
    (cloud.folder / "runs/x/summary.json").touch()
    assert submit().returncode == 0
    assert notes.read_text().count("scontrol") == 1

    def ends(code: int, saves: str = ":") -> subprocess.CompletedProcess[str]:
        write_script(cloud.folder / "bin/srun", f"#!/bin/sh\n{saves}\nexit {code}\n")
        return submit()

    failed = ends(2)
    assert failed.returncode == 1 and "training ended with an error" in failed.stderr

    # A lost process queues again, if the run continued since it started; an error never does.
    (cloud.folder / "runs/x/summary.json").unlink()
    for code, step, again in ((75, 10, 1), (137, 20, 1), (2, 30, 0), (75, 30, 0)):
        notes.write_text("")
        done = ends(code, f"mkdir -p runs/x/checkpoints/{step}")
        assert done.returncode == 1 - again, (code, step, done.stderr)
        assert notes.read_text().count("scontrol requeue 7") == again, (code, step)


def test_shellcheck_has_nothing_to_say():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is missing: pip install -e '.[check]'")
    scripts = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / ".ci/run"]
    command = ["shellcheck", "--external-sources", *map(str, scripts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
