# shellcheck shell=bash disable=SC2034
# Every setting of the scripts in this folder, with its default. Change it here, or by the flag of
# the same name: --zone=…, --service-account=…. Relative paths start at the repository's folder.

# The cloud. These three have no default.
PROJECT= # Google Cloud project that pays
ZONE=    # zone that has the TPU, for example us-west4-a
BUCKET=  # without gs://, for data, code and runs; made in the zone's region where it is missing

# The TPU.
NAME=ssrl        # of the queued resource and of its nodes
TOPOLOGY=v5e:4x4 # chips of one slice; `launch/tpu.sh topologies` lists them
SLICES=1         # slices, joined over the data-centre network
CAPACITY=spot    # spot (cheaper, may be taken away) or on-demand
RUNTIME_VERSION= # the VMs' image; empty: the one that belongs to the topology
SERVICE_ACCOUNT= # account of the VMs; empty: the project's default
WAIT=60          # seconds between two polls or tries
PATIENCE=86400   # seconds to wait for capacity
ATTEMPTS=5       # tries where the cloud refuses (capacity, ssh, deletion)
RESUMES=20       # interruptions after which `all` gives up

# The run.
CONFIG=configs/grpo_3b.py # a file of configs/
RUN=                      # its name, and its folder's below runs/; empty: the config's file name
MODEL=                    # initial model: a hub id, a folder, gs://…; empty: the config's own
IMAGES=                   # images for `prepare`: KIND=FOLDER words, as "coco=/d/coco nyu=/d/nyu"
SOURCE=                   # data.source; empty: what `prepare` packs, or the config's own
OUT=                      # local folder for the files of a run; empty: runs/RUN

# GPUs.
VENV=.venv # the virtual environment that gpu.sh makes and slurm.sbatch uses
