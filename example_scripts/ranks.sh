# shellcheck shell=bash
# Sourced by scripts that start ranks as background jobs: `wait_ranks` waits for them all. SIGTERM,
# SIGINT (Ctrl-C) and SIGUSR1 to the script are passed on to the ranks, which save and end with
# status 75. Whatever ends the script, a rank that dies among it, no rank is left behind.

passed_on=""

# A signal came: asks every rank to stop; ends the script where none runs. The second one, passed on
# likewise, makes them stop at once.
pass_on() {
  [ -n "$(jobs -pr)" ] || exit "$1"
  passed_on=1
  jobs -pr | xargs -r kill -TERM 2>/dev/null || true
}

# Ends the ranks that still run: asked first, killed after ten seconds.
stop_ranks() {
  local deadline=$((SECONDS + 10))
  jobs -pr | xargs -r kill -TERM 2>/dev/null || true
  await_ranks "$deadline"
  jobs -pr | xargs -r kill -KILL 2>/dev/null || true
}

# Waits until no rank runs, but not past a deadline in the shell's SECONDS.
await_ranks() {
  while [ -n "$(jobs -pr)" ] && ((SECONDS < $1)); do sleep 0.2 || true; done
}

# Waits for all ranks. When one fails, the others have ten seconds to say so and end by themselves,
# or, when one has stopped as asked, two minutes to close what they have open; then they are ended.
# Returns 75 where one has stopped as asked, else the first status that is not 0.
wait_ranks() {
  local status=0 one left
  left=$(jobs -p | wc -l)
  while ((left > 0)); do
    one=0 passed_on=""
    wait -n || one=$?
    if [ -n "$passed_on" ] && ((one > 128)); then continue; fi # no rank ended: a signal came
    ((left -= 1)) || true
    if ((one == 75 || status == 0)); then status=$one; fi
    ((status)) || continue
    await_ranks $((SECONDS + (one == 75 ? 120 : 10)))
    if ((left == $(jobs -pr | wc -l))); then # none ended by itself but those that are counted
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
