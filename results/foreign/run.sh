#!/usr/bin/env bash
# Two networks that are not of the zoo, trained, quantized and distilled, about an hour on two cores: makes
# results/foreign/mobilenet.json and results/foreign/segmenter.json. Stopped, the same line goes on.
#
#   results/foreign/run.sh DATA_ROOT WORK     DATA_ROOT holds cifar-10-batches-py, WORK is a folder of its own
set -euo pipefail
data=$1 work=$2
export OMP_NUM_THREADS=1

study() {
  exec python -m faqd.benchmarks.studies.own_networks --network "$1" --data-root "$data" --out "$work/$1" \
    --json "results/foreign/$1.json"
}
# One network on each core.
study segmenter &
other=$!
trap 'kill "$other" 2>/dev/null || true' EXIT
(study mobilenet)
wait "$other"
