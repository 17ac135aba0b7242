#!/usr/bin/env bash
# Trains on the NVIDIA GPUs of this machine:
#
#   launch/gpu.sh [--config=configs/X.py] [--setting=value …] [--config.a.b=v …] [--dry-run]
#
# Makes a virtual environment where there is none, checks that JAX sees the GPUs, and trains in
# runs/RUN; the same command resumes a run that stopped. Settings are in launch/settings.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
LAUNCH=launch
# shellcheck source=launch/settings.sh
source "$LAUNCH/settings.sh"
# shellcheck source=launch/lib.sh
source "$LAUNCH/lib.sh"

install() {
  run python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "python3 is older than 3.11: install a newer one, or make $VENV with it."
  run python3 -m venv "$VENV" ||
    stop "$VENV cannot be made: install python3-venv, or give --venv=FOLDER."
  run "$VENV/bin/python" -m pip install --quiet -e '.[gpu]' ||
    stop "the package cannot be installed: fix the error above, and remove $VENV."
}

# Stops where a config of GRPO starts from a cold start that is not there; not in a dry run.
cold_start() {
  local name sft
  name=$(basename "$CONFIG" .py)
  sft=sft_${name#grpo_}
  [[ $DRY || $name != grpo_* || $MODEL || ! -f configs/$sft.py || -d runs/$sft/export ]] && return
  [[ " ${OVERRIDES[*]}" =~ " --config."(model.path|grpo.init_from)[=\ ] ]] && return
  stop "$CONFIG starts from runs/$sft/export, which is not there: make it with \
launch/gpu.sh --config=configs/$sft.py${SOURCE:+ --source=$SOURCE}, or give --model=FOLDER."
}

main() {
  read_flags "$@"
  cold_start
  run nvidia-smi --list-gpus ||
    stop "no NVIDIA driver answers: install one, or train with python -m spatial_ssrl_jax.train."
  [[ -x $VENV/bin/python ]] || install
  run "$VENV/bin/python" -c 'import jax; jax.devices("gpu")' ||
    stop "JAX sees no GPU: run $VENV/bin/python -m pip install -e '.[gpu]'."
  # By default XLA leaves a quarter to other processes; `plan` assumes this fraction.
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}
  local words=(--config="$CONFIG" --workdir="runs/$RUN")
  [[ ! $SOURCE ]] || words+=(--config.data.source="$SOURCE")
  [[ ! $MODEL ]] || words+=(--config.model.path="$MODEL")
  run "$VENV/bin/python" -m spatial_ssrl_jax.train "${words[@]}" "${OVERRIDES[@]}"
}

main "$@"
