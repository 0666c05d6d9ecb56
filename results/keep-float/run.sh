#!/usr/bin/env bash
# Two detectors that lose in 8/8 bits, without training, with nothing and with a few places float. Makes the records of
# results/keep-float; the last two commands judge. About an hour on two cores.
#
#   results/keep-float/run.sh DEFAULTS WORK     DEFAULTS holds models and coco, as results/README.md says of defaults
set -euo pipefail
results=$(cd "$(dirname "$0")" && pwd)
work=$(mkdir -p "$2" && cd "$2" && pwd)
cd "$1"
export OMP_NUM_THREADS=1 COCO_ANNOTATIONS=coco/object_detection/labels/val2017

text=(--teacher models/ppocrv5_det/ppocrv5_det.py:build --teacher-weights models/ppocrv5_det/ppocrv5_det.pth
  --data folder:coco/images/train2017 --image-size 320 --resize letterbox --channels bgr)
objects=(--teacher models/yolox_nano/yolox_nano.py:build --teacher-weights models/yolox_nano/yolox_nano.pth
  --data folder:coco/images/train2017 --eval-data folder:coco/images/val2017 --image-size 416 --resize letterbox)
pixels=(--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225)

faqd deploy sensitivity "${text[@]}" "${pixels[@]}" --json "$results/ppocrv5_det-sensitivity.json" \
  --chart "$results/ppocrv5_det-sensitivity.svg"
faqd deploy ptq "${text[@]}" "${pixels[@]}" --out "$work/ppocrv5_det/int8"
faqd deploy ptq "${text[@]}" "${pixels[@]}" --keep-float 12 --out "$work/ppocrv5_det/keep-float"
faqd deploy ptq "${objects[@]}" "${pixels[@]}" --out "$work/yolox_nano/int8"
faqd deploy ptq "${objects[@]}" "${pixels[@]}" --keep-float 5 --out "$work/yolox_nano/keep-float"

judge=(--eval-data folder:coco/images/val2017 --skip-latency)
faqd bench "$work"/ppocrv5_det/* "${judge[@]}" --metric "$results/../defaults/metrics.py:text" \
  --json "$results/ppocrv5_det.json"
faqd bench "$work"/yolox_nano/* "${judge[@]}" --metric "$results/../../examples/detector/coco_map.py:metric" \
  --json "$results/yolox_nano.json"
