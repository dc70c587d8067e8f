#!/bin/sh
# Usage: wheel.sh PYTHON WHEEL. Installs the wheel alone in a new environment, and uses it from an empty folder: no
# converter, no torch, no checkout. Then with the extra `check`: an ONNX file is checked, a wrong one fails, without torch.
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
for verb in export ship check bench report run generate bundle show models recipes devices doctor cache; do
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
"$place/env/bin/pip" install --quiet "$wheel[check]"
cat > make.py << 'END'
import sys
import onnx
from onnx import TensorProto, helper

values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
graph = helper.make_graph([helper.make_node(sys.argv[1], ["x"], ["y"])], "g", values[:1], values[1:])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), sys.argv[2])
END
python="$place/env/bin/python"
"$python" make.py Relu net.onnx
"$handheld" export net.onnx --out out
"$handheld" check out --require onnx --junit check.xml
"$python" make.py Abs out/net/onnx-fp32/net.onnx
if "$handheld" check out > failed.txt; then
  echo "check of a wrong file should have failed" >&2
  exit 1
fi
grep -q 'it was altered after its export' failed.txt
"$python" -c 'import importlib.util, time; assert importlib.util.find_spec("torch") is None; t = time.perf_counter()
import handheld.api; print(f"importing what check needs: {time.perf_counter() - t:.2f} s")'
echo "the wheel works"
