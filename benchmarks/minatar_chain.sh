#!/usr/bin/env bash
# Does injection help where plasticity is lost? A chain of MinAtar games, played one after the other by one agent (Double DQN, Adam at 3e-4,
# an update for two steps): the continual setting in which its loss is published.
#
#     bash benchmarks/minatar_chain.sh [DIR]      DIR: results/minatar-chain, unless given
#
# Runs what is missing in DIR, seed after seed: an hour a run on one core without AVX-512, and SEEDS x 11 of them. WORKERS=2 runs two at a
# time. Interventions come at the two switches; checkpoints are kept there, for `diagnose RUN --at 500k`. Afterwards:
#
#     python -m growtrain report DIR/* --output DIR-report
set -euo pipefail
dir=${1:-results/minatar-chain}
chain=${CHAIN:-minatar/space_invaders+asterix+seaquest}
seeds=${SEEDS:-0 1 2 3 4}
export OMP_WAIT_POLICY=PASSIVE

arm() { # name, seed, flags
    python -m growtrain sweep --dir "$dir/$1" --games "$chain" --seeds "$2," --workers "${WORKERS:-1}" \
        --total-frames "${FRAMES:-1.5M}" --num-envs 8 --device cpu --replay-ratio 0.5 \
        --optimizer adam --lr 3e-4 --optimizer-eps 1e-5 --keep 2 "${@:3}"
}

for seed in $seeds; do
    arm plain "$seed" --schedules fixed,full2x
    arm network "$seed" --schedules at-switch --freeze network
    arm heads "$seed" --schedules at-switch --freeze heads
    arm reset-head "$seed" --schedules at-switch --intervention reset-head
    arm cold "$seed" --schedules at-switch --freeze network --live-encoder cold
    arm shrink-perturb "$seed" --schedules at-switch --intervention shrink-perturb
    arm l2-init "$seed" --schedules fixed --regularizer l2-init
    arm layer-norm "$seed" --schedules fixed --normalization layer
    arm redo "$seed" --schedules redo --redo-tau 0.1
    arm adaptive "$seed" --schedules adaptive --freeze network
done
