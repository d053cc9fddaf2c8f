#!/usr/bin/env bash
# Trains one run on a TPU slice of any size, with gcloud alone: creates the slice, copies this checkout, runs the same
# command on all workers, and starts over when the slice is preempted, until the run has ended.
#
#   NAME=deit ZONE=us-west4-a TYPE=v5litepod-256 BUCKET=… scripts/launch/tpu_pod.sh \
#       --config configs/vit/imagenet_deit.py:reparam=sigma --workdir /mnt/runs/deit --config.data.data_dir=/mnt/runs/tfds
#
# The arguments are passed to scripts/train.py. The workdir must be visible to every worker at the same path, on a Filestore
# or a mounted bucket: with BUCKET=… gcsfuse mounts gs://$BUCKET at /mnt/runs.
# Variables: NAME, ZONE, TYPE; PROJECT; SPOT=1 for a preemptible slice; VERSION of the TPU software; BUCKET;
# KEEP=1 keeps the slice at the end. DRY_RUN=1 prints the commands.
set -euo pipefail
: "${NAME:?name of the slice}" "${ZONE:?zone of the slice}" "${TYPE:?for example v5litepod-256}"
case "$TYPE" in
  v5lite*) version=v2-alpha-tpuv5-lite ;;
  v5p*) version=v2-alpha-tpuv5 ;;
  v6e*) version=v2-alpha-tpuv6e ;;
  *) version=tpu-ubuntu2204-base ;;
esac
version=${VERSION:-$version}
root=$(cd "$(dirname "$0")/../.." && pwd)
common=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

say() { echo "tpu_pod.sh: $*" >&2; }
do_() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
tpu() { do_ gcloud compute tpus tpu-vm "$@" "${common[@]}"; }
everywhere() { tpu ssh "$NAME" --worker=all --command "$1"; }
state() { [ -n "${DRY_RUN:-}" ] || gcloud compute tpus tpu-vm describe "$NAME" "${common[@]}" --format='value(state)' 2>/dev/null; }

create() {
  case "$(state)" in
    READY) return ;;
    "") ;;
    *) tpu delete "$NAME" --quiet ;;
  esac
  tpu create "$NAME" --accelerator-type "$TYPE" --version "$version" ${SPOT:+--spot}
}

copy() {
  do_ tar -czf "/tmp/$NAME.tar.gz" -C "$root" --exclude-vcs --exclude=runs .
  tpu scp "/tmp/$NAME.tar.gz" "$NAME:/tmp/sigmarep.tar.gz" --worker=all
  everywhere 'mkdir -p ~/sigmarep && tar -xzf /tmp/sigmarep.tar.gz -C ~/sigmarep && cd ~/sigmarep && python3 -m venv .venv && .venv/bin/pip install -q "jax[tpu]" -e ".[text,speech]"'
  if [ -n "${BUCKET:-}" ]; then
    everywhere "sudo mkdir -p /mnt/runs && (mountpoint -q /mnt/runs || sudo gcsfuse -o allow_other --implicit-dirs $BUCKET /mnt/runs)"
  fi
}

arguments=$(printf '%q ' "$@")
for ((attempt = 1; ; attempt++)); do
  # A slice that is not available now may be available later.
  if create && copy; then
    status=0
    everywhere "cd ~/sigmarep && .venv/bin/python scripts/train.py --distributed=on --distributed_timeout=300 $arguments" || status=$?
    case $status in
      # Done, bad input or diverged: a new attempt would end the same way.
      0 | 2 | 3) break ;;
    esac
    if [ "$(state)" = READY ] && [ "$status" -ne 143 ]; then
      say "the run failed with $status on a slice that still exists"
      break
    fi
  else
    status=1
  fi
  [ -z "${DRY_RUN:-}" ] || break
  say "attempt $attempt ended with $status and the slice is $(state || true); retrying in 60 s"
  sleep 60
done
[ -n "${KEEP:-}" ] || tpu delete "$NAME" --quiet
exit "$status"
