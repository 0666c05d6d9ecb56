#!/usr/bin/env bash
# A short CIFAR-10 run for two CPU cores, about an hour: results/cifar10-short/resnet20.json is its last line's output.
#
#   results/cifar10-short/run.sh DATA_ROOT WORK     DATA_ROOT holds cifar-10-batches-py, WORK is a new folder
#
# Twelve epochs for the teacher and ten for each student, where the recipes have 200: it shows the order of things, not
# what the method can reach. Nothing is chosen on the test images; one seed. The students are those of before steps became
# shares of what is learned: by SGD.
set -euo pipefail
data=$1 work=$2
export OMP_NUM_THREADS=1

faqd-train teacher --recipe cifar10-resnet20-teacher --data-root "$data" --epochs 12 --out "$work/teacher"
# One student on each core.
faqd-train distill --recipe cifar10-resnet20-w4a4 --optimizer sgd --data-root "$data" --teacher "$work/teacher" --epochs 10 --out "$work/run-w4a4" &
other=$!
faqd-train distill --recipe cifar10-resnet20 --optimizer sgd --data-root "$data" --teacher "$work/teacher" --epochs 10 --out "$work/run-w8a8"
wait "$other"
for bits in 8 4; do
  faqd-deploy ptq --teacher "$work/teacher" --data-root "$data" --weight-bits $bits --act-bits $bits --out "$work/ptq-w${bits}a$bits"
  faqd-deploy export "$work/run-w${bits}a$bits" --data-root "$data" --out "$work/w${bits}a$bits"
done
faqd-bench "$work/ptq-w8a8" "$work/w8a8" "$work/ptq-w4a4" "$work/w4a4" --batch 1,32 --json results/cifar10-short/resnet20.json
