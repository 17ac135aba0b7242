# shellcheck shell=bash
# Google Cloud: the state of a queued resource, commands on all of its workers, the bucket.

INTERRUPTED=75   # the exit code after which `resume` continues
ERRORS=$(mktemp) # the last stderr of gcloud
WORKERS=         # number of workers, once counted
ANSWERS=         # the last output of the workers
trap 'rm -f "$ERRORS"' EXIT

queued() {
  run gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

# The last error of gcloud, in one line.
error_line() {
  local line
  line=$(grep -m 1 -E 'ERROR|"message"' "$ERRORS" || tail -n 1 "$ERRORS")
  echo "${line:-no message}"
}

no_capacity() {
  grep -qiE 'no more capacity|(not enough|insufficient) (resources|capacity)|stockout' "$ERRORS"
}

# Prints the request's state: NONE where there is none, UNKNOWN where gcloud fails; a dry run
# prints $1.
state() {
  local now
  if now=$(queued describe --format='value(state.state)' 2>"$ERRORS"); then
    [[ ! $DRY ]] || now=$1
    echo "${now:-UNKNOWN}"
  elif grep -q NOT_FOUND "$ERRORS"; then
    echo NONE
  else
    echo UNKNOWN
  fi
}

# The names of the slices' nodes.
nodes() {
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    seq -f "$NAME-%.0f" 0 $((SLICES - 1))
  fi
}

tpu_vm() { run gcloud compute tpus tpu-vm "$1" "$2" --project="$PROJECT" --zone="$ZONE" "${@:3}"; }

# Whether the request or one of its nodes was preempted: nodes go before its state changes.
preempted() {
  local node
  case $(state ACTIVE) in
    SUSPENDING | SUSPENDED | FAILED | NONE) return 0 ;;
    ACTIVE) ;;
    *) return 1 ;;
  esac
  [[ ! $DRY ]] || return 1
  for node in $(nodes); do
    if tpu_vm describe "$node" --format='value(state)' 2>&1 |
      grep -qE 'PREEMPTED|TERMINATED|NOT_FOUND'; then
      return 0
    fi
  done
  return 1
}

# Counts the workers of all slices.
count_workers() {
  local node found
  [[ ! $WORKERS ]] || return 0
  WORKERS=0
  for node in $(nodes); do
    found=$(tpu_vm describe "$node" --flatten='networkEndpoints[]' \
      --format='value(networkEndpoints.ipAddress)' 2>"$ERRORS" | grep -c .) || found=0
    ((WORKERS += found)) || true
  done
}

# Runs a subcommand of vm.sh on every worker; returns 0 when all are ok, 1 when one failed, 2 when
# one cannot be reached in ATTEMPTS tries (or $2).
everywhere() {
  local try tries=${2:-$ATTEMPTS}
  for ((try = 1; try <= tries; try++)); do
    count_workers
    ANSWERS=$(queued ssh --node=all --worker=all --quiet --command="$1" 2>&1) || true
    [[ ! $DRY ]] || return 0
    if grep '^failed ' <<<"$ANSWERS" >&3; then
      return 1
    fi
    if ((WORKERS > 0 && $(grep -c '^ok ' <<<"$ANSWERS") == WORKERS)); then
      return 0
    fi
    WORKERS=
    ! preempted || return 2
    ((try == tries)) || sleep "$WAIT"
  done
  return 2
}

interrupted() {
  echo "error: $*" >&2
  exit "$INTERRUPTED"
}

# The same, or stops with the reason and the command to run next.
must_everywhere() {
  local code=0
  everywhere "$2" || code=$?
  case $code in
    1) stop "a worker failed at $1 (its error is above): fix it, then run $(next "$1")" ;;
    2) unreached "$1" ;;
  esac
}

unreached() {
  ! preempted || interrupted "$NAME was preempted or is gone: continue with $(next resume)"
  printf '%s\n' "$ANSWERS" | tail -n 5 >&2
  stop "not every worker of $NAME answers over ssh:" \
    "try ssh-add ~/.ssh/google_compute_engine, then $(next "$1")"
}

in_bucket() { run gcloud storage ls "gs://$BUCKET/$1" >/dev/null 2>&1; }

# The newest line of the run's metrics in the bucket, in short.
newest_metrics() {
  local part line
  part=$(run gcloud storage ls "gs://$BUCKET/runs/$RUN/metrics/" 2>/dev/null | tail -n 1)
  [[ $part == *.jsonl ]] && line=$(run gcloud storage cat "$part" 2>/dev/null | tail -n 1)
  if [[ ${line:-} =~ \"step\":\ ([0-9]+),\ \"stage\":\ \"([a-z]+)\" ]]; then
    echo "step ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]}" \
      "$(sed -nE 's/.*"(reward\/overall_mean|loss\/sft)": ([^,}]+).*/(\1 \2)/p' <<<"$line")"
  else
    echo "no step yet"
  fi
}

make_bucket() {
  if run gcloud storage buckets describe "gs://$BUCKET" --format='value(name)' >/dev/null 2>&1; then
    [[ $DRY ]] || return 0
    echo "# where there is none:" >&3
  fi
  run gcloud storage buckets create "gs://$BUCKET" --project="$PROJECT" --location="${ZONE%-*}" \
    --uniform-bucket-level-access 2>"$ERRORS" ||
    stop "gs://$BUCKET can be neither read nor made ($(error_line)): give another --bucket=NAME."
  say "gs://$BUCKET was made; what it stores is charged until it is removed."
}
