#!/usr/bin/env bash
# Does injection help where plasticity is lost at once? Heavy priming (Nikishin et al. 2022): 100 transitions, 100,000 updates on them, then
# normal training, of SAC on a task of the control suite.
#
#     bash benchmarks/sac_priming.sh [DIR]      DIR: results/sac-priming, unless given
#
# Runs what is missing in DIR, seed after seed: SEEDS x 6 runs. WORKERS=2 runs two at a time. Interventions come after 1,000 steps, when
# priming is over; `unprimed` shows what it has cost. Afterwards:
#
#     python -m growtrain report DIR/* --output DIR-report
set -euo pipefail
dir=${1:-results/sac-priming}
game=${GAME:-dmc/quadruped-run}
seeds=${SEEDS:-0 1 2}
frames=${FRAMES:-300k}
after=${AFTER:-1k}
primed=(--learning-starts 100 --priming-updates "${PRIMING:-100k}")
export OMP_WAIT_POLICY=PASSIVE

arm() { # name, seed, flags
    python -m growtrain sweep --dir "$dir/$1" --games "$game" --seeds "$2," --workers "${WORKERS:-1}" --total-frames "$frames" --device cpu "${@:3}"
}

for seed in $seeds; do
    arm primed "$seed" --schedules fixed "${primed[@]}"
    arm inject-critic "$seed" --schedules "at:$after" --grow critic "${primed[@]}"
    arm inject-both "$seed" --schedules "at:$after" --grow both "${primed[@]}"
    arm reset "$seed" --schedules "at:$after" --intervention reset-all "${primed[@]}"
    arm layer-norm "$seed" --schedules fixed --normalization layer "${primed[@]}"
    arm unprimed "$seed" --schedules fixed --learning-starts 100
done
