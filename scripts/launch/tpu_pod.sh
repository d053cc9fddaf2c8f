#!/usr/bin/env bash
# One run on a TPU slice of any size, by gcloud alone: creates the slice, copies this checkout, runs the same command on
# all workers, and does all of it again when the slice was taken away, until the run has ended.
#
#   NAME=deit ZONE=us-west4-a TYPE=v5litepod-256 BUCKET=… scripts/launch/tpu_pod.sh \
#       --config configs/vit/imagenet_deit.py:reparam=sigma --workdir /mnt/runs/deit --config.data.data_dir=/mnt/runs/tfds
#
# What stands behind the script goes to scripts/train.py. The workdir must lie where every worker sees it, a Filestore or a
# bucket mounted at the same place on each: with BUCKET=… gs://$BUCKET is mounted at /mnt/runs by gcsfuse.
# Variables: NAME, ZONE, TYPE; PROJECT; SPOT=1 for a slice that may be taken away; VERSION of the TPU software; BUCKET;
# KEEP=1 leaves the slice there at the end. DRY_RUN=1 prints the commands.
set -euo pipefail
: "${NAME:?names the slice}" "${ZONE:?where it stands}" "${TYPE:?for example v5litepod-256}"
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
  # A slice that cannot be had now may be had later.
  if create && copy; then
    status=0
    everywhere "cd ~/sigmarep && .venv/bin/python scripts/train.py --distributed=on --distributed_timeout=300 $arguments" || status=$?
    case $status in
      # Done, wrong input, diverged: making it again would end the same way.
      0 | 2 | 3) break ;;
    esac
    if [ "$(state)" = READY ] && [ "$status" -ne 143 ]; then
      say "the run failed with $status on a slice that is there"
      break
    fi
  else
    status=1
  fi
  [ -z "${DRY_RUN:-}" ] || break
  say "attempt $attempt ended with $status and the slice is $(state || true); again in 60 s"
  sleep 60
done
[ -n "${KEEP:-}" ] || tpu delete "$NAME" --quiet
exit "$status"
