#!/usr/bin/env bash
# Who scores more for the same compute? MinAtar games, small width 32, so that full3x has the published network's 128 units; Adam, with
# which a quarter of the published agent's updates reaches its scores.
#
#     bash benchmarks/minatar_study.sh [DIR]      DIR: results/minatar, unless given
#
# Runs what is missing in DIR, seed after seed, first of the arms that the question is about: five to sixteen minutes a run on one core, and
# SEEDS x GAMES x 16 of them. WORKERS=2 runs two at a time. `network-equal`, `mirrored-equal` and `fixed-equal` do so many more updates that
# training takes 92 to 107 % of full3x's FLOPs, by the game (`plan` counts them); `wide`, whose live network has the full width from the
# start, takes 106 %, `mid`, with half of it, 63 %. `quadruple` is the full width of `wide`: 512 units, as many parameters as its four
# networks have together. Afterwards:
#
#     python -m growtrain report DIR/* --output DIR-report
set -euo pipefail
dir=${1:-results/minatar}
games=${GAMES:-minatar/breakout,minatar/space_invaders,minatar/asterix}
seeds=${SEEDS:-0 1 2 3 4}
export OMP_WAIT_POLICY=PASSIVE

arm() { # name, seed, flags
    python -m growtrain sweep --dir "$dir/$1" --games "$games" --seeds "$2," --workers "${WORKERS:-1}" \
        --total-frames 1M --num-envs 8 --device cpu --replay-ratio "${ratio:-0.25}" \
        --optimizer adam --lr 3e-4 --optimizer-eps 1e-5 "${@:3}"
}

for seed in $seeds; do
    arm heads "$seed" --width 32 --schedules fixed,full3x --freeze heads
    arm network "$seed" --width 32 --schedules grow3x --freeze network
    arm heads "$seed" --width 32 --schedules fixed,full3x,grow3x --freeze heads
    arm wide "$seed" --width 128 --schedules grow3x --freeze network
    arm mid "$seed" --width 64 --schedules grow3x --freeze network
    arm quadruple "$seed" --width 128 --schedules full3x --freeze heads
done
for seed in $seeds; do
    ratio=0.6 arm network-equal "$seed" --width 32 --schedules grow3x --freeze network
    arm mirrored "$seed" --width 32 --schedules grow3x --anchor mirrored
    arm network "$seed" --width 32 --schedules grow3x,grow5x,every:125k --freeze network
    ratio=0.6 arm fixed-equal "$seed" --width 32 --schedules fixed
    arm cold "$seed" --width 32 --schedules grow3x --freeze network --live-encoder cold
    ratio=0.34 arm mirrored-equal "$seed" --width 32 --schedules grow3x --anchor mirrored
    arm heads "$seed" --width 32 --schedules fixed,full3x,grow3x,reset --freeze heads
    arm network "$seed" --width 32 --schedules grow3x,grow5x,every:125k,adaptive --freeze network
done
