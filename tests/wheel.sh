#!/bin/sh
# Usage: wheel.sh PYTHON WHEEL. Installs the wheel alone in a new environment, and uses it from an empty folder: no
# converter, no torch, no checkout.
set -eu
python=$1
wheel=$(realpath "$2")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/env"
"$place/env/bin/pip" install --quiet "$wheel"
cd "$place"
unset PYTHONPATH
export HANDHELD_CACHE="$place/cache"
handheld="$place/env/bin/handheld"
"$handheld" --version
for verb in export ship check bench report run show models recipes devices doctor cache; do
  "$handheld" "$verb" --help > /dev/null
done
"$handheld" models
"$handheld" recipes > /dev/null
"$handheld" doctor
if "$handheld" export efficientformerv2_s0 --to onnx 2> error.txt; then
  echo "export without torch should have failed" >&2
  exit 1
fi
grep -q 'pip install "handheld\[' error.txt
! grep -q Traceback error.txt
echo "the wheel works"
