# shellcheck shell=bash
# Sourced by scripts that start ranks as background jobs: `wait_ranks` waits for them all, and
# whatever ends the script, a rank that dies or Ctrl-C among it, no rank is left behind.

# Ends the ranks that still run: asked first, killed after ten seconds.
stop_ranks() {
  local deadline=$((SECONDS + 10))
  jobs -pr | xargs -r kill -TERM 2>/dev/null || true
  await_ranks "$deadline"
  jobs -pr | xargs -r kill -KILL 2>/dev/null || true
}

# Waits until no rank runs, but not past a deadline in the shell's SECONDS.
await_ranks() {
  while [ -n "$(jobs -pr)" ] && ((SECONDS < $1)); do sleep 0.2; done
}

# Waits for all ranks. When one fails, the others have ten seconds to say so and end by themselves;
# then they are stopped. Returns the first status that is not 0.
wait_ranks() {
  local status=0 left
  for ((left = $(jobs -p | wc -l); left > 0; left--)); do
    wait -n || { status=$?; break; }
  done
  if ((status)); then
    await_ranks $((SECONDS + 10))
    stop_ranks
  fi
  return "$status"
}

trap stop_ranks EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
