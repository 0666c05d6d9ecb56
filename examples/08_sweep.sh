#!/bin/sh
# One cell of a sweep over bits and seeds, for launchers that start jobs by number:
#
#     examples/08_sweep.sh NUMBER --teacher net.py:build --teacher-weights best.pth --data folder:images ...
#
# Cells are counted from 0; `count` instead of NUMBER prints how many there are. Started again, a finished cell ends at
# once and any other goes on from its checkpoint. docs/sweeps.md has launchers, and what becomes of the folder.
set -eu
WEIGHTS=${WEIGHTS:-"2 4 8"} ACTIVATIONS=${ACTIVATIONS:-"4 8"} SEEDS=${SEEDS:-"0 1 2"} OUT=${OUT:-runs}
asked=$1
shift
cell=0
for weights in $WEIGHTS; do
    for activations in $ACTIVATIONS; do
        for seed in $SEEDS; do
            if [ "$asked" = "$cell" ]; then
                exec ${FAQD_TRAIN:-faqd-train} distill "$@" --weight-bits "$weights" --act-bits "$activations" \
                    --seed "$seed" --data-seed "$seed" --out "$OUT/w${weights}a${activations}-s$seed" --resume
            fi
            cell=$((cell + 1))
        done
    done
done
if [ "$asked" = count ]; then
    echo "$cell"
else
    echo "error: cell $asked: there are $cell, counted from 0." >&2
    exit 2
fi
