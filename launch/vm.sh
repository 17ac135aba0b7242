#!/usr/bin/env bash
# Runs on each TPU VM. launch/tpu.sh calls it over ssh and counts the answers, because ssh to many
# workers may lose one without an error: each subcommand except `stop` and `job` ends in one line,
# `ok HOST …` or `failed HOST …`.
set -euo pipefail
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ROOT=$(dirname "$CODE")
VENV=$ROOT/venv
JOB=$ROOT/job # log, arguments, pid, and the exit code once there is one
HOST=$(hostname)

ok() { echo "ok $HOST $*"; }

failed() {
  echo "failed $HOST $*"
  exit 1
}

# Python 3.11 or newer: the system's, or one that uv downloads.
make_venv() {
  [[ -x $VENV/bin/python ]] && return
  if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' && python3 -m venv "$VENV"; then
    return
  fi
  rm -rf "$VENV"
  python3 -m pip install --quiet --user uv && python3 -m uv venv --seed --python 3.11 "$VENV"
}

# Installs the package, and checks the bucket as training uses it.
setup() {
  local output
  make_venv || failed "no Python 3.11: install it, or choose a newer RUNTIME_VERSION."
  "$VENV/bin/python" -m pip install --quiet -e "${CODE}[tpu,gcs]" ||
    failed "the dependencies cannot be installed: see the lines above."
  output=$(try_bucket "$1/probes/$HOST") || failed "${output##*$'\n'}"
  ok "set up with $("$VENV/bin/python" --version)"
}

# Checks every permission that training needs, and writes and removes a file.
try_bucket() {
  "$VENV/bin/python" - "$1" 2>&1 <<'PYTHON'
from spatial_ssrl_jax.common.errors import run_command
from spatial_ssrl_jax.common.paths import check_bucket, user_path
def main(argv):
    check_bucket(user_path(argv[0]))
    probe = user_path(argv[0]) / "probe"
    probe.write_text("may this machine write here")
    probe.unlink()
run_command(main)
PYTHON
}

# Joins all workers and counts their chips.
check() {
  local seen
  seen=$(timeout 600 "$VENV/bin/python" -c \
    'import jax; jax.distributed.initialize(); print(jax.device_count())' | tail -n 1) ||
    failed "the workers do not find one another: see the lines above."
  [[ $seen == "$1" ]] || failed "sees $seen chips in place of $1."
  ok "sees $seen chips"
}

running() {
  local pid
  [[ ! -f $JOB/exit ]] && pid=$(cat "$JOB/pid" 2>/dev/null) &&
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q 'vm.sh job'
}

# Starts training in a session of its own, so that it outlives ssh; takes the command's words.
train() {
  if running; then
    [[ $* == "$(cat "$JOB/arguments")" ]] ||
      failed "still training with $(cat "$JOB/arguments"): wait for its end, or stop it by setup."
    ok "is training already"
    return
  fi
  mkdir -p "$JOB" && rm -f "$JOB/exit"
  echo "$*" >"$JOB/arguments"
  setsid bash "$CODE/launch/vm.sh" job "$@" >>"$JOB/log" 2>&1 </dev/null &
  echo $! >"$JOB/pid"
  ok "started training"
}

# Trains, and records the exit code. The group's SIGTERM is for Python, which then saves.
job() {
  local code=0
  trap : TERM
  cd "$CODE"
  "$VENV/bin/python" -m spatial_ssrl_jax.train "$@" || code=$?
  echo "$code" >"$JOB/exit"
}

# The state of training: idle, running, or its exit code; with the last line of its log.
status() {
  local code=lost
  if running; then
    ok "running: $(last_line)"
  elif [[ ! -f $JOB/pid ]]; then
    ok "idle"
  else
    [[ -f $JOB/exit ]] && code=$(cat "$JOB/exit")
    [[ $code == 0 ]] || tail -n 15 "$JOB/log" | sed 's/^/    /'
    ok "exit $code: $(last_line)"
  fi
}

last_line() { tail -n 20 "$JOB/log" | { grep -v '^ *$' || echo "no output yet"; } | tail -n 1; }

# Signals the training to save and end, waits ten minutes, and clears its exit code.
stop() {
  local try
  ! running || kill -TERM -- "-$(cat "$JOB/pid")"
  for ((try = 0; try < 3000; try++)); do
    running || break
    sleep 0.2
  done
  ! running || kill -KILL -- "-$(cat "$JOB/pid")"
  rm -f "$JOB/pid" "$JOB/exit"
}

"$@"
