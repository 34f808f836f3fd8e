# shellcheck shell=bash
# Sourced: makes .venv in the current folder where there is none, completes it with requirements.txt
# and the packages named as arguments, and activates it. Does nothing twice: .venv/.installed keeps
# what was asked for when the last installation ended well.
wanted="$(cat requirements.txt) $*"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
# shellcheck source=/dev/null
source .venv/bin/activate
case "$(cat .venv/.installed 2>/dev/null)" in
  "$wanted"*) ;;
  *)
    echo "installing requirements into .venv ..." >&2
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt "$@"
    echo "$wanted" > .venv/.installed
    ;;
esac
