# shellcheck shell=bash
# Source this: it makes .venv in the current folder if there is none, installs requirements.txt and the
# arguments (in pip's form: `-r requirements-dev.txt`, or packages) in the versions of
# constraints.txt, and activates .venv. A second call installs nothing: .venv/.installed has the
# packages of the last successful installation; a call without arguments needs only the first of these.

# show_progress LOG: copies pip's output to a log. Prints a line for each download of a megabyte or
# more, and a line after each ten seconds without output.
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
Installing packages into .venv. Training needs about 75 packages: pip downloads 0.4 GB with torch's CPU
build, or 3 GB with its CUDA build, which PyPI has for Linux. The tests need another 0.5 GB. A first
installation takes two to ten minutes. pip's output is in .venv/install.log.
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
