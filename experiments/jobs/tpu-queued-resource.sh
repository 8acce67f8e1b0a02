#!/bin/bash
# One worker on a spot TPU VM that is asked for as a queued resource, and asked for again when it was preempted, until
# the sweep is over. Start it as often as you want workers, each under a NAME of its own:
#
#     export ZONE=YOUR_ZONE SETUP='YOUR COMMANDS' SHARED=/mnt/shared GRID_FILE=experiments/jobs/grid.toml
#     NAME=sweep-0 bash experiments/jobs/tpu-queued-resource.sh &
#     NAME=sweep-1 bash experiments/jobs/tpu-queued-resource.sh &
#
# SETUP runs on the VM before the worker: it mounts the file system SHARED that all workers have (Filestore; buckets have
# no hard links), changes into this repository and installs 'madjax[tpu]'. With DRY_RUN=1 the worker only shows commands.
# TYPE is a slice of one host: workers know nothing of each other but the folder they share.
set -euo pipefail

name=${NAME:-madjax-sweep}
zone=(--zone="${ZONE:?wanted the zone of the TPU VM}")
tpu=(gcloud compute tpus)
worker="${PYTHON:-python3} -m experiments.sweep --grid_file=${GRID_FILE:-experiments/jobs/grid.toml}"
worker+=" --workdir=${SHARED:?wanted the folder that all workers share}/sweep ${DRY_RUN:+--dry_run}"
output=$(mktemp)
trap 'rm -f "$output"' EXIT

state() {
  "${tpu[@]}" queued-resources describe "$name" "${zone[@]}" --format='value(state.state)' 2>/dev/null || true
}

delete() {
  "${tpu[@]}" queued-resources delete "$name" "${zone[@]}" --force --quiet
}

while true; do
  if [[ -z "$(state)" ]]; then
    "${tpu[@]}" queued-resources create "$name" "${zone[@]}" --node-id="$name" --spot \
      --accelerator-type="${TYPE:-v5litepod-8}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}"
  fi
  case "$(state)" in
    ACTIVE)
      # gcloud's own exit status does not tell a worker that failed from a VM that is gone
      "${tpu[@]}" tpu-vm ssh "$name" "${zone[@]}" --worker=all \
        --command="{ ${SETUP:-true}; } && $worker; echo worker ended with \$?" </dev/null | tee "$output" || true
      # 0: all cells are done. 1: some failed, or SETUP did, which another VM does not mend. Else the VM was preempted.
      if grep -q 'worker ended with [01]$' "$output"; then
        delete
        grep -q 'worker ended with 0$' "$output"
        exit
      fi
      ;;
    SUSPENDED) # preempted
      delete
      ;;
    FAILED)
      echo "error: TYPE: the queued resource $name of ${TYPE:-v5litepod-8} failed; gcloud's describe tells why" >&2
      exit 1
      ;;
  esac
  sleep "${POLL_SECONDS:-30}"
done
