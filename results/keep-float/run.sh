#!/usr/bin/env bash
# Two detectors that lose in 8/8 bits: without training, with a few layers float, judged on images that nothing was
# chosen on; and which kind of roundings costs one of them most. Makes the records beside this file.
#
#   results/keep-float/run.sh DEFAULTS WORK     DEFAULTS holds models and coco, as results/README.md says of defaults
set -euo pipefail
results=$(cd "$(dirname "$0")" && pwd)
work=$(mkdir -p "$2" && cd "$2" && pwd)
cd "$1"
export OMP_NUM_THREADS=1 COCO_ANNOTATIONS=coco/object_detection/labels/val2017

pixels=(--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225)
text=(--teacher models/ppocrv5_det/ppocrv5_det.py:build --teacher-weights models/ppocrv5_det/ppocrv5_det.pth
  --data folder:coco/images/train2017 --image-size 320 --resize letterbox --channels bgr "${pixels[@]}")
objects=(--teacher models/yolox_nano/yolox_nano.py:build --teacher-weights models/yolox_nano/yolox_nano.pth
  --data folder:coco/images/train2017 --eval-data folder:coco/images/val2017 --image-size 416 --resize letterbox
  "${pixels[@]}")

judge() { # NETWORK METRIC
  faqd bench "$work/$1" --eval-data folder:coco/images/val2017 --metric "$2" --skip-latency --json "$results/$1.json"
  python - "$work/$1/manifest.json" "$results/$1-trials.json" <<'EOF'
import json, pathlib, sys
kept = json.loads(pathlib.Path(sys.argv[1]).read_text())["kept_float"]
pathlib.Path(sys.argv[2]).write_text(json.dumps(kept, indent=2) + "\n")
EOF
}

python -m faqd.benchmarks.studies.roundings networks.json --only ppocrv5_det --json "$results/ppocrv5_det-roundings.json"
faqd deploy ptq "${text[@]}" --keep-float 12 --out "$work/ppocrv5_det"
judge ppocrv5_det "$results/../defaults/metrics.py:text"
faqd deploy ptq "${objects[@]}" --keep-float 5 --out "$work/yolox_nano"
judge yolox_nano "$results/../../examples/detector/coco_map.py:metric"
