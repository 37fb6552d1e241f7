#!/usr/bin/env bash
# A first session on a GPU, in nine minutes: does the project run there, then what it costs. Run it in the project's root.
#
#   bash benchmarks/gpu_session.sh                   the log, results.tar.gz and exit code 1 if any part failed
#   SMALL=1 bash benchmarks/gpu_session.sh           a rehearsal on the CPU with tiny networks: the same parts, the same flags
#   ONLY='smoke|wallclock' bash benchmarks/...       only the parts whose names match
#
# OUT (default out) is where log.txt and results.tar.gz go, PY the Python, LIMIT the seconds for all parts. A host that has PyTorch and no package
# registry takes the rest from a folder of wheels, WHEELS (default .whl), filled elsewhere by `pip download --no-deps -d .whl PACKAGES`.
# A part that fails is said, and the next one begins. One that goes on uncompiled where it was to compile has failed; in a rehearsal the whole run
# compiles its optimizer's step, as on a GPU, and parts that would compile whole updates instead, for minutes, compile nothing.
set -u
OUT=${OUT:-out}; SMALL=${SMALL:-}; PY=${PY:-python3}; WHEELS=${WHEELS:-.whl}; W=$(mktemp -d); T0=$SECONDS
mkdir -p "$OUT"; : > "$W/failed"
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE TORCHINDUCTOR_CACHE_DIR=$W/inductor MPLBACKEND=Agg
unset TORCHDYNAMO_DISABLE
if [ -d "$WHEELS" ]; then
  "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$W/site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$W/site:$PWD
else export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}; fi
if [ "$SMALL" ]; then
  export CUDA_VISIBLE_DEVICES=; DEV=cpu; LIMIT=${LIMIT:-900}; PATIENCE=3; NET="--width 16 --encoder-width 0.25"
  UNCOMPILED="env TORCHDYNAMO_DISABLE=1"
  EAGER="--total-frames 3k --num-envs 4 --learning-starts 200 --replay-capacity 2000 --eval-frames 400 --diagnostics-period 1000 $NET"
  SMOKE="$EAGER --replay-ratio 15 --batch-size 4"  # 10.5k updates, see below
  LANES="4"; THROUGHPUT="--seconds 1 --repeats 1 --warm-up-steps 200 --profile-steps 2 --replay-capacity 1000 $NET"
  GROWTH="--widths 16 --encoder-width 0.25 --freeze-encoder-at 0 2 --seconds 0.5 --updates-per-turn 1 --batch-size 4"
  WALLCLOCK="--num-envs 4 --fill 200 --cell-capacity 400 --seconds 0.5 --repeats 1 --minutes 0.3 --no-validate $NET"
else
  DEV=cuda; LIMIT=${LIMIT:-540}; PATIENCE=1; UNCOMPILED=
  SMOKE="--total-frames 200k --num-envs 64"  # 11.9k updates: enough for the optimizer's step to be compiled
  EAGER="--total-frames 40k --num-envs 64 --execution eager"
  LANES="64 8"; THROUGHPUT="--seconds 18 --repeats 4 --profile-steps 20 --warm-up-steps 8000"
  GROWTH="--widths 512 --freeze-encoder-at 0 2 --seconds 24 --updates-per-turn 50"
  WALLCLOCK="--num-envs 64 --fill 20k --seconds 2 --repeats 2 --minutes 3 --no-validate"
fi

keep() { # two parts may end at once, and others write meanwhile
  local partial; partial=$(mktemp "$OUT/.results.XXXXXX")
  tar -czf "$partial" --warning=no-file-changed -C "$W" --exclude ./inductor --exclude ./site --exclude checkpoints .
  mv "$partial" "$OUT/results.tar.gz"
}
report() { # name, exit code, seconds: the end of its log, and whether it failed
  echo "=== $1: $([ "$2" -eq 0 ] && echo ok || echo "FAILED, exit code $2"), $3 s"
  tail -n "${TAIL:-25}" "$W/$1.log"
  [ "$2" -eq 0 ] || echo "$1 (exit code $2)" >> "$W/failed"
  keep; return "$2"
}
step() { # name, seconds at most on a GPU, command: within the time that is left, and not begun with less than 30 s of it
  local name=$1 most=$(($2 * PATIENCE)) begin=$SECONDS left=$((LIMIT - SECONDS + T0)) code; shift 2
  [[ $name =~ ${ONLY:-.} ]] || return 0
  if [ $left -lt 30 ]; then
    echo "=== $name: SKIPPED, $left s are left"; echo "$name (no time left)" >> "$W/failed"; return 1
  fi
  [ $left -ge "$most" ] || most=$left
  timeout -k 5 "$most" "$@" > "$W/$name.log" 2>&1; code=$?
  if [ $code -eq 0 ] && grep -q 'runs uncompiled' "$W/$name.log"; then code=1; fi
  report "$name" $code $((SECONDS - begin))
}

{
  [ "$SMALL" ] || nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw --format=csv
  TAIL=14 step doctor 60 "$PY" -m growtrain doctor

  # 1. Does it run? Tests and a whole run side by side, for neither is timed. Warnings are shown and no errors: libraries may be of other versions.
  step tests 110 "$PY" -m pytest -m gpu -q -W default -p no:cacheprovider -p no:benchmark \
    tests/replay/test_frames.py tests/telemetry/test_gpu.py tests/learners/test_double_dqn.py > "$W/tests.said" &
  tests=$!
  if ! step smoke 110 "$PY" -W default -m growtrain --game phoenix --schedule grow3x --freeze heads --device $DEV $SMOKE --run-dir "$W/smoke"; then
    step smoke-eager 60 "$PY" -W default -m growtrain --game phoenix --schedule grow3x --freeze heads --device $DEV $EAGER \
      --run-dir "$W/smoke-eager"
  fi
  step compiled 5 ls -d "$TORCHINDUCTOR_CACHE_DIR"/*
  step smoke-network 60 "$PY" -W default -m growtrain --game phoenix --schedule grow3x --freeze network --device $DEV $EAGER \
    --execution auto --run-dir "$W/smoke-network"
  wait $tests; cat "$W/tests.said"
  for run in smoke smoke-network; do
    [ ! -f "$W/$run/growth_events.jsonl" ] || cut -c1-420 "$W/$run/growth_events.jsonl"
  done
  [ ! -f "$W/smoke/summary.json" ] || "$PY" - "$W/smoke/summary.json" <<'P'
import json, sys
s = json.load(open(sys.argv[1])); print({k: s[k] for k in ("status", "reason", "frames", "updates", "frames_per_second", "gpu")})
P

  # 2. Speed of the loop at the lanes meant for a GPU. 3. Growing against full width: an update alone. 4. The whole loop, and its projection.
  set -- $LANES
  step throughput-$1 70 $UNCOMPILED "$PY" -W default benchmarks/throughput.py --device $DEV --num-envs $1 $THROUGHPUT --output "$W/throughput-$1"
  step growth_cost 95 $UNCOMPILED "$PY" -W default benchmarks/growth_cost.py --device $DEV $GROWTH --output "$W/growth_cost"
  step wallclock 205 $UNCOMPILED "$PY" -W default benchmarks/run_wallclock.py --device $DEV --schedule grow3x --freeze heads,network --anchor mirrored $WALLCLOCK --output "$W/wallclock"
  shift
  for lanes; do
    step throughput-$lanes 60 $UNCOMPILED "$PY" -W default benchmarks/throughput.py --device $DEV --num-envs $lanes $THROUGHPUT --output "$W/throughput-$lanes"
  done
  if [ -s "$W/failed" ]; then echo "=== FAILED after $((SECONDS - T0)) s: $(paste -sd, "$W/failed")"; else echo "=== all parts are done after $((SECONDS - T0)) s"; fi
} 2>&1 | tee "$OUT/log.txt"
keep
[ ! -s "$W/failed" ]; code=$?
rm -rf "$W"
exit $code
