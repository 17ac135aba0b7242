# shellcheck shell=bash
# Shared by the scripts of this folder: flags, dry runs, messages, and the table of topologies.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is too old: install bash 4.4 or newer." >&2
  exit 1
fi

DRY=
FLAGS=()     # the flags as they were given, for the commands that messages name
OVERRIDES=() # --config.SECTION.NAME=VALUE, for training
exec 3>&1    # messages for people; also from inside $(…)

# Prints a message; a dry run prints only commands.
say() { [[ $DRY ]] || echo "$*" >&3; }

stop() {
  echo "error: $*" >&2
  exit 1
}

# Prints words so that a shell reads them back as they are.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  echo "$line"
}

# Runs a command; a dry run prints it instead.
run() {
  if [[ $DRY ]]; then
    quoted "$@" >&3
  else
    "$@"
  fi
}

# Names the command to run next, with the flags of this one.
next() { quoted "$LAUNCH/$(basename "$0")" "$@" "${FLAGS[@]}"; }

# Takes `--name=value` for each setting of settings.sh, `--config.a.b=v`, and `--dry-run`.
read_flags() {
  local flag name known
  known=$(sed -n 's/^\([A-Z_]*\)=.*/\1/p' "$LAUNCH/settings.sh")
  for flag in "$@"; do
    name=${flag%%=*} name=${name#--} name=${name//-/_} name=${name^^}
    case $flag in
      --dry-run) DRY=1 && continue ;;
      --config.*=*) OVERRIDES+=("$flag") ;;
      --*=*)
        grep -qxF -- "$name" <<<"$known" || stop "unknown flag $flag: see $LAUNCH/settings.sh."
        printf -v "$name" %s "${flag#*=}"
        ;;
      *) stop "unknown word $flag: flags look like --zone=us-west4-a, see $LAUNCH/settings.sh." ;;
    esac
    FLAGS+=("$flag")
  done
  [[ -f $CONFIG ]] || stop "$CONFIG does not exist: give --config=configs/NAME.py."
  [[ $RUN ]] || RUN=$(basename "$CONFIG" .py)
  [[ $OUT ]] || OUT=runs/$RUN
}

# Topology, accelerator type, chips of a slice. Types of v4 and v5p count cores, two a chip.
topologies() {
  local generation shape chips
  while read -r generation shape; do
    chips=$((${shape//x/*}))
    case $generation in
      v5e) echo "v5e:$shape v5litepod-$chips $chips" ;;
      v6e) echo "v6e:$shape v6e-$chips $chips" ;;
      *) echo "$generation:$shape $generation-$((2 * chips)) $chips" ;;
    esac
  done < <(
    printf 'v5e %s\n' 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16
    printf 'v6e %s\n' 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16
    printf 'v5p %s\n' 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8
    printf 'v4 %s\n' 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8
  )
}

# Sets ACCELERATOR, CHIPS and, unless it is given, RUNTIME_VERSION for TOPOLOGY.
look_up_topology() {
  local found
  found=$(topologies | awk -v wanted="$TOPOLOGY" '$1 == wanted')
  [[ $found ]] ||
    stop "unknown topology $TOPOLOGY: give one of $(topologies | cut -d' ' -f1 | paste -sd' ')."
  read -r _ ACCELERATOR CHIPS <<<"$found"
  if [[ ! $RUNTIME_VERSION ]]; then
    case $TOPOLOGY in
      v5e:*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
      v5p:*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
      v6e:*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
      v4:*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
    esac
  fi
  export ACCELERATOR CHIPS RUNTIME_VERSION
}
