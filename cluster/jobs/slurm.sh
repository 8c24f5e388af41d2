asked="" step=""
# USR1 comes before the time limit: the steps get a TERM, save and end. TERM comes where SLURM takes the job away (scancel, preemption,
# scontrol requeue): SLURM tells the steps itself, kills what is left some time later, and knows whether the job starts again.
trap 'asked=limit; tell' USR1
trap 'asked=taken' TERM
tell() { [ -z "$step" ] || scancel --signal=TERM "$job"; }

say() { echo "[$(date +%FT%T) job $job start $restart] $*"; }

# one job of an array is never named by its own number: the last one's is the whole array's
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restart=${SLURM_RESTART_COUNT:-0}
notes=$run/slurm
head=$(scontrol -o show node "$SLURMD_NODENAME" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
export VIDEOAR_FAILED=$notes/failed-$SLURM_JOB_ID

# Runs one of the steps below and waits for its end. A launcher that failed says so by a file: srun alone would wait for minutes for the
# tasks of a node that is gone; so the others have some seconds more to end, too, and then the job goes back or ends, and they with it.
follow() {
  [ -z "$asked" ] || return 3
  local status left=10
  [ -z "$VIDEOAR_FAILED" ] || rm -f "$VIDEOAR_FAILED"
  "$@" & step=$!
  [ "$asked" != limit ] || tell
  while kill -0 "$step" 2>/dev/null; do
    sleep 0.5
    if [ -n "$VIDEOAR_FAILED" ] && [ -e "$VIDEOAR_FAILED" ] && [ "$((left--))" -le 0 ]; then kill -KILL "$step"; break; fi
  done
  wait "$step" 2>/dev/null; status=$?
  [ "$left" -gt 0 ] || status=1
  step=""
  return "$status"
}

free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)); (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

field() { scontrol -o show job "$job" | grep -o " $1=[^ ]*" | head -n 1 | cut -d= -f2; }

# Back into the queue, as the same job; leaves out the nodes named, with commas, and those left out before.
requeue() {
  trap '' TERM USR1
  if [ "$(field JobState)" != RUNNING ]; then say "SLURM is taking the job away by itself"; exit 3; fi
  scontrol requeue "$job" || { say "this cluster does not requeue: submit the job again, it goes on"; exit 3; }
  if [ -n "${1:-}" ]; then
    local before; before=$(field ExcNodeList)
    [ "$before" = "(null)" ] && before=""
    for _ in $(seq 100); do
      scontrol update "jobid=$job" "ExcNodeList=${before:+$before,}$1" 2>/dev/null && break
      sleep 0.1
    done
  fi
  exit 3
}

saved() { ls -1 "$progress" 2>/dev/null | grep -E '^(step-)?[0-9]+$' | sort -V; }
newest() { saved | tail -n 1; }

# A start that failed: once more, unless it has failed too often without a new checkpoint in between.
try_again() {
  local status=$1 out=${2:-} newest failures=0 at=""
  newest=$(newest)
  { read -r failures at <"$notes/failures-$SLURM_JOB_ID"; } 2>/dev/null
  [ "$at" = "${newest:-none}" ] || failures=0
  failures=$((failures + 1))
  echo "$failures ${newest:-none}" >"$notes/failures-$SLURM_JOB_ID"
  if [ "$failures" -gt "$max_restarts" ]; then
    say "status $status; it has failed $failures times since ${newest:-the beginning}: no further start"
    exit "$status"
  fi
  say "status $status; failure $failures of at most $max_restarts since ${newest:-the beginning}: once more"
  requeue "$out"
}

# What became of a step that did not end with 0.
judge() {
  local status=$1
  case $status in
    2) say "a setting must be mended first: no further start"; exit 2 ;;
    3 | 138 | 143) # it was told to stop: saved, or had not begun
      if [ "$asked" = taken ]; then say "SLURM took the job away"; exit 3; fi
      if [ "$asked" = limit ] && [ "$(saved)" = "$at_start" ]; then
        say "told to stop before the time limit with nothing new saved since it began: is the limit long enough for warn_seconds and a start?"
        try_again 3
      fi
      say "stopped by a signal${asked:+ before the time limit} and saved: it goes on in its next turn"
      requeue ;;
  esac
  if [ "$asked" = taken ]; then say "SLURM took the job away (status $status)"; exit "$status"; fi
  try_again "$status"
}

# Which nodes the check $1 finds sick by its output in the file $2, with commas. Each node's health is its own: one without an "ok" is
# sick. Ranks wait for each other, and importing torch takes one node much longer than another: only a "bad" line blames a node.
sick() {
  local node found=""
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    if [ "$1" = health ]; then
      grep -qE "^ok $node(\$| )" "$2" && continue
    else
      grep -q "^bad $node: " "$2" || continue
    fi
    found+="${found:+,}$node"
  done
  echo "$found"
}

# Before each start: finds sick nodes and starts again without them. No file to say by that one has failed: the others are waited for.
inspect() {
  local kind=$1 file="$notes/$1-$SLURM_JOB_ID.txt" status bad
  VIDEOAR_FAILED="" follow "$kind" >"$file" 2>&1; status=$?
  cat "$file"
  [ "$status" != 0 ] || return 0
  case $status in 3 | 138 | 143) judge "$status" ;; esac
  [ "$asked" != taken ] || judge "$status"
  bad=$(sick "$kind" "$file")
  if [ -z "$bad" ]; then say "the pre-flight check '$kind' failed and no node alone is to blame"; try_again "$status"; fi
  if [ "$bad" = "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" ] && [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    say "the pre-flight check '$kind' failed on all nodes: see above and mend it"; exit 1
  fi
  say "sick: $bad; it starts again without"
  try_again "$status" "$bad"
}

mkdir -p "$notes"
at_start=$(saved)
say "on $SLURM_JOB_NODELIST"
