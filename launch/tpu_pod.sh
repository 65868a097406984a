#!/usr/bin/env bash
# Runs one config on every host of a TPU pod slice; each host takes its share of the prompts.
#   launch/tpu_pod.sh TPU_NAME ZONE --config=configs/scenes.py:study --config.workdir=/mnt/runs
# The workdir must be one file system that all hosts mount (Filestore, a mounted bucket). The command
# can be repeated: what is done is kept, a preempted slice goes on where it stopped.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
name=$1 zone=$2; shift 2
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone" --worker=all; }
tpu scp --recurse . "$name:vtts_jax"
tpu ssh "$name" --command="cd vtts_jax && python3 -m venv ~/venv && ~/venv/bin/pip install -q -e '.[tpu]' \
  && ~/venv/bin/vtts run $(printf '%q ' "$@") --distributed"
