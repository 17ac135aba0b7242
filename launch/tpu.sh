#!/usr/bin/env bash
# Trains on Cloud TPUs:
#
#   launch/tpu.sh SUBCOMMAND [--setting=value …] [--config.a.b=v …] [--dry-run]
#
#   prepare     packs images of this machine (IMAGES) into the bucket
#   create      requests the TPU as a queued resource, and waits until it is active
#   setup       Python and the package on every worker; credentials and chips checked
#   train       starts training on every worker; it continues without this machine
#   watch       shows the progress of training until it ends
#   resume      continues after a preemption: removes what is left, then create, setup, train
#   fetch       copies the trained model and the report here
#   delete      releases the TPU
#   all         prepare, create, setup, train, watch and resume until it is complete, fetch, delete
#   topologies  values of --topology, with gcloud's name and the number of chips
#
# Settings and their defaults are in launch/settings.sh; each is a flag as well. --dry-run prints
# the commands and runs none of them. Exit codes: 0 done, 75 interrupted (resume continues), 1 error.
set -euo pipefail
cd "$(dirname "$0")/.."
LAUNCH=launch
# shellcheck source=launch/settings.sh
source "$LAUNCH/settings.sh"
# shellcheck source=launch/lib.sh
source "$LAUNCH/lib.sh"
# shellcheck source=launch/cloud.sh
source "$LAUNCH/cloud.sh"

prepare() {
  local word kind
  if [[ ! $IMAGES ]]; then
    say "IMAGES is empty: nothing to pack."
    return
  fi
  make_bucket
  run gcloud auth application-default print-access-token >/dev/null 2>&1 ||
    stop "Python has no credentials for the bucket:" \
      "run gcloud auth application-default login, then $(next prepare)"
  for word in $IMAGES; do
    kind=${word%%=*}
    if in_bucket "data/ssrl_pictures/$kind/" && [[ ! $DRY ]]; then
      say "gs://$BUCKET/data has $kind already."
    else
      run python -m spatial_ssrl_jax.prepare "$kind" "${word#*=}" "gs://$BUCKET/data" ||
        stop "$kind was not packed: fix the error above, then run $(next prepare)"
    fi
  done
}

# $1: the state that a dry run begins in.
create() {
  local try now
  WORKERS=
  for ((try = 1; try <= ATTEMPTS; try++)); do
    ((try == 1)) || sleep "$WAIT"
    now=$(state "${1:-NONE}")
    case $now in
      UNKNOWN) stop "gcloud cannot describe $NAME ($(error_line)): fix it, then $(next create)" ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) must_remove && now=NONE ;;
    esac
    if [[ $now != NONE ]] || request; then
      ! until_active || return 0
    fi
  done
  [[ $(state NONE) == NONE ]] || must_remove
  stop "no capacity for $ACCELERATOR in $ZONE in $ATTEMPTS tries:" \
    "try another --zone or --capacity, or later $(next create)"
}

# Sends the request; fails where there is no capacity, stops at any other refusal.
request() {
  local words=(--accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME_VERSION")
  if ((SLICES == 1)); then
    words+=(--node-id="$NAME")
  else
    words+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  [[ $CAPACITY != spot ]] || words+=(--spot)
  [[ ! $SERVICE_ACCOUNT ]] || words+=(--service-account="$SERVICE_ACCOUNT")
  queued create "${words[@]}" --quiet 2>"$ERRORS" || refused
}

# Fails where the last error is a lack of capacity, and stops at any other.
refused() {
  no_capacity || stop "gcloud refuses $NAME ($(error_line)): fix that, then run $(next create)"
  say "no capacity for $ACCELERATOR in $ZONE"
  return 1
}

# Waits for the TPU; fails where it is not granted, stops after PATIENCE seconds.
until_active() {
  local now before='' begun=$SECONDS
  while ((SECONDS - begun <= PATIENCE)); do
    now=$(state ACTIVE)
    [[ $now == "$before" ]] || say "$NAME: $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      SUSPENDED | NONE) return 1 ;;
      FAILED)
        queued describe --format='value(state.failedData.error.message)' >"$ERRORS" 2>&1
        refused || return 1
        ;;
    esac
    sleep "$WAIT"
  done
  stop "$NAME is $now after $PATIENCE seconds: continue waiting with $(next create)"
}

setup() {
  local archive=gs://$BUCKET/code/$NAME.tar.gz packed=/tmp/$NAME-$$.tar.gz
  make_bucket
  run tar -czf "$packed" --exclude=__pycache__ \
    pyproject.toml README.md LICENSE spatial_ssrl_jax configs launch ||
    stop "the code cannot be packed to $packed: fix the error above, then run $(next setup)"
  run gcloud storage cp "$packed" "$archive" ||
    stop "the code cannot be copied to $archive: fix the error above, then run $(next setup)"
  run rm "$packed"
  must_everywhere setup "rm -rf code.new && mkdir code.new && \
gcloud storage cat $archive | tar -xzC code.new && bash code.new/launch/vm.sh stop && \
rm -rf code && mv code.new code && bash code/launch/vm.sh setup gs://$BUCKET"
  must_everywhere setup "bash code/launch/vm.sh check $((CHIPS * SLICES))"
}

# data.source: SOURCE, or everything that `prepare` packs. Beside COCO, as in the paper, images with
# depth serve the tasks that need it and no others.
source_spec() {
  local word kind spec=$SOURCE
  [[ $spec ]] || for word in $IMAGES; do
    kind=${word%%=*}
    spec+=${spec:+"+"}
    [[ $kind == coco || " $IMAGES" != *" coco="* ]] || spec+="depth,position@"
    spec+="tfds:ssrl_pictures/$kind@gs://$BUCKET/data"
  done
  echo "$spec"
}

train() {
  local spec words=(--config="$CONFIG" --workdir="gs://$BUCKET/runs/$RUN" --distributed)
  spec=$(source_spec)
  [[ ! $spec ]] || words+=(--config.data.source="$spec")
  [[ ! $MODEL ]] || words+=(--config.model.path="$MODEL")
  words+=("${OVERRIDES[@]}")
  must_everywhere train "bash code/launch/vm.sh train $(quoted "${words[@]}")"
  say "training started: watch it with $(next watch)"
}

# Shows the progress of training until it is complete; exits with INTERRUPTED where it can resume.
watch() {
  while :; do
    everywhere "bash code/launch/vm.sh status" || unreached watch
    say "$(date +%H:%M:%S) $(grep '^ok ' <<<"$ANSWERS" | sort | head -n 1)"
    say "         in the bucket: $(newest_metrics)"
    grep -qE '^ok [^ ]+ running' <<<"$ANSWERS" || break
    sleep "$WAIT"
  done
  if grep -qE '^ok [^ ]+ idle' <<<"$ANSWERS"; then
    stop "nothing trains on $NAME: start with $(next train)"
  elif grep -qE '^ok [^ ]+ exit [1-9]' <<<"$ANSWERS" && ! grep -q ' exit lost' <<<"$ANSWERS"; then
    echo "$ANSWERS" >&2
    stop "training ended with an error (above): fix it, then run $(next resume)"
  fi
  in_bucket "runs/$RUN/summary.json" ||
    interrupted "training was interrupted and is not complete: continue with $(next resume)"
  say "training is complete: copy it with $(next fetch)"
}

# $1: the state that a dry run begins in.
resume() {
  local before=${1:-SUSPENDED}
  if [[ $(state "$before") == ACTIVE ]]; then
    if preempted; then
      must_remove
    elif everywhere "bash code/launch/vm.sh status" 1 &&
      (($(grep -cE '^ok [^ ]+ running' <<<"$ANSWERS") == WORKERS)); then
      say "every worker is training already."
      return
    fi
  fi
  create "$before"
  setup
  train
}

# Removes the request and its nodes; fails where something stays.
remove() {
  local try left
  for ((try = 1; try <= ATTEMPTS; try++)); do
    ((try == 1)) || sleep "$WAIT"
    queued delete --force --quiet 2>"$ERRORS" || grep -q NOT_FOUND "$ERRORS" || continue
    [[ $(state NONE) == NONE ]] || continue
    left=$(run gcloud compute tpus tpu-vm list --project="$PROJECT" --zone="$ZONE" \
      --filter="name~\"/nodes/$NAME(-[0-9]+)?\$\"" --format='value(name)' 2>"$ERRORS") || continue
    [[ $left ]] || return 0
    echo "ERROR: nodes are left: ${left//$'\n'/ }" >"$ERRORS"
  done
  return 1
}

must_remove() {
  remove ||
    stop "$NAME could not be deleted ($(error_line)) and may still be charged: run $(next delete)"
}

delete() {
  must_remove
  say "$NAME is gone. gs://$BUCKET stays and is charged for what it stores;" \
    "gcloud storage rm --recursive gs://$BUCKET removes it."
}

fetch() {
  local part from=gs://$BUCKET/runs/$RUN
  in_bucket "runs/$RUN/export/config.json" ||
    stop "$from/export does not exist: check the progress with $(next watch)"
  for part in export adapter metrics; do
    in_bucket "runs/$RUN/$part/" || continue # only runs with LoRA leave an adapter
    run mkdir -p "$OUT/$part"
    run gcloud storage rsync --recursive "$from/$part" "$OUT/$part" || not_fetched
  done
  run gcloud storage cp "$from/*.json" "$from/report.html" "$from/events.*" "$OUT/" || not_fetched
  [[ $DRY ]] || cat "$OUT"/metrics/part_*.jsonl >"$OUT/metrics.jsonl"
  say "$OUT/export is the trained model, $OUT/report.html the report."
}

not_fetched() { stop "gs://$BUCKET/runs/$RUN was not copied whole: run $(next fetch) again."; }

all() {
  local code tries
  prepare
  for ((tries = 0; tries <= RESUMES; tries++)); do
    code=0
    (resume NONE && watch) || code=$?
    case $code in
      0) fetch && delete && return ;;
      "$INTERRUPTED") say "interrupted (${tries} times before); resuming" ;;
      *) exit "$code" ;;
    esac
  done
  stop "training was interrupted $RESUMES times: continue with $(next all)"
}

# At the end of every subcommand: what is charged, and how to stop that.
remind() {
  local code=$? now
  trap - EXIT
  now=$(state NONE)
  rm -f "$ERRORS"
  case $now in
    NONE) ;;
    ACTIVE) say "$NAME ($SLICES x $ACCELERATOR, $CAPACITY) is charged until: $(next delete)" ;;
    UNKNOWN) say "$NAME may exist and be charged (no state); remove it: $(next delete)" ;;
    FAILED | SUSPENDED) say "$NAME is $now and holds no TPU; remove it: $(next delete)" ;;
    *) say "$NAME is $now and is charged once it is ACTIVE; cancel it: $(next delete)" ;;
  esac
  exit "$code"
}

check_settings() {
  local name
  for name in PROJECT ZONE BUCKET; do
    [[ ${!name} ]] ||
      stop "$name is not set: set it in $LAUNCH/settings.sh or give --${name,,}=VALUE."
  done
  [[ $CAPACITY =~ ^(spot|on-demand)$ ]] ||
    stop "unknown capacity $CAPACITY: give --capacity=spot or on-demand."
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] ||
    stop "slices are counted from 1: give --slices=1 or more, not $SLICES."
  look_up_topology
  [[ ! $DRY ]] || return 0
  command -v gcloud >/dev/null || stop "gcloud is missing: install the Google Cloud CLI."
  [[ $(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null) ]] ||
    stop "gcloud has no account: run gcloud auth login."
}

main() {
  local verb=${1:-}
  case $verb in
    create | setup | prepare | train | watch | resume | fetch | delete | all) ;;
    topologies) topologies && return ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$LAUNCH/tpu.sh" && exit 2 ;;
  esac
  read_flags "${@:2}"
  check_settings
  [[ $DRY ]] || trap remind EXIT
  "$verb"
}

main "$@"
