# shellcheck shell=bash
# Sourced: makes .venv in the current folder if there is none, completes it with requirements.txt and
# what the arguments name (as pip takes it: `-r requirements-dev.txt`, or packages), in the versions
# of constraints.txt, and activates it. Does nothing twice: .venv/.installed keeps what was asked for
# when the last installation succeeded; a call without arguments asks for the beginning of that.

# show_progress LOG: copies pip's output to a log. Prints a line for each download of a megabyte or
# more, and one whenever pip has said nothing for ten seconds.
show_progress() {
  local line status begin=$SECONDS
  while true; do
    status=0
    IFS= read -r -t 10 line || status=$?
    if ((status > 128)); then
      echo "  $((SECONDS - begin)) s ..."
      continue
    fi
    ((status == 0)) || return 0
    printf '%s\n' "$line" >>"$1"
    case "$line" in
      *" MB)") echo "  $((SECONDS - begin)) s: ${line#"${line%%[! ]*}"}" ;;
      "Installing collected "*) echo "  $((SECONDS - begin)) s: unpacking and compiling" ;;
    esac
  done
}

wanted=$(cat requirements.txt constraints.txt)
for argument in "$@"; do
  if [ -f "$argument" ]; then argument=$(cat "$argument"); fi
  wanted+=" $argument"
done
if [ ! -x .venv/bin/python ]; then "${PYTHON:-python3}" -m venv .venv; fi
# shellcheck source=/dev/null
source .venv/bin/activate
case "$(cat .venv/.installed 2>/dev/null)" in
  "$wanted"*) ;;
  *)
    cat >&2 <<'END'
Installing packages into .venv. Training needs some 75: 0.4 GB to download where pip finds torch's CPU
build, 3 GB with its CUDA build, which PyPI has for Linux. The tests need another 0.5 GB. From nothing
that takes two to ten minutes. All that pip says is in .venv/install.log.
END
    : >.venv/install.log
    (
      set -o pipefail
      python -m pip install --disable-pip-version-check --progress-bar off \
        -r requirements.txt -c constraints.txt "$@" 2>&1 | show_progress .venv/install.log >&2
    ) || {
      echo "The installation failed; the end of .venv/install.log:" >&2
      tail -n 15 .venv/install.log >&2
      exit 1
    }
    echo "$wanted" >.venv/.installed
    ;;
esac
