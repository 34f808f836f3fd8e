# shellcheck shell=bash
# Source this in scripts that start ranks as background jobs; `wait_ranks` waits for all ranks. The
# script passes SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 on to the ranks, which save and end with status
# 75. No rank survives the script, also if the script ends because a rank died.

passed_on=""

# Handles a signal: asks every rank to stop, or ends the script if no rank runs. A second signal is
# passed on in the same way, and stops the ranks at once.
pass_on() {
  [ -n "$(jobs -pr)" ] || exit "$1"
  passed_on=1
  jobs -pr | xargs -r kill -TERM 2>/dev/null || true
}

# Ends the ranks that still run: sends SIGTERM, and SIGKILL after ten seconds.
stop_ranks() {
  local deadline=$((SECONDS + 10))
  jobs -pr | xargs -r kill -TERM 2>/dev/null || true
  await_ranks "$deadline"
  jobs -pr | xargs -r kill -KILL 2>/dev/null || true
}

# Waits until no rank runs, or until a deadline in the shell's SECONDS.
await_ranks() {
  while [ -n "$(jobs -pr)" ] && ((SECONDS < $1)); do sleep 0.2 || true; done
}

# Waits for all ranks. After a rank fails, the others have ten seconds to report it and end. After a
# rank stops as asked (75), the others have two minutes to close their files. Then stop_ranks ends
# them. Returns 75 if a rank stopped as asked, else the first status that is not 0.
wait_ranks() {
  local status=0 one left
  left=$(jobs -p | wc -l)
  while ((left > 0)); do
    one=0 passed_on=""
    wait -n || one=$?
    if [ -n "$passed_on" ] && ((one > 128)); then continue; fi # a signal, not the end of a rank
    ((left -= 1)) || true
    if ((one == 75 || status == 0)); then status=$one; fi
    ((status)) || continue
    await_ranks $((SECONDS + (one == 75 ? 120 : 10)))
    if ((left == $(jobs -pr | wc -l))); then # no further rank has ended
      stop_ranks
      break
    fi
  done
  return "$status"
}

trap stop_ranks EXIT
trap 'pass_on 130' INT
trap 'pass_on 143' TERM
trap 'pass_on 138' USR1
