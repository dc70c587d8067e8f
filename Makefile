# make demo   an environment, handheld with every format, one model shipped
# make test   the same environment and the tests, as CI runs them
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers, each with one thread: converters and runtimes bring threads of their own. Files go in the order of their
# names, short ones of tests/unit last: by default those with the fewest tests would, which take the longest. What is
# compiled is kept, whatever the caller says: the tests start a thousand processes.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint types tests apple apple-full zoo zoo-tiny matrix test-slow kills mutations faults fuzz false-alarms damage versus versus-quantized accuracy recovery bench-coreml wheel schemas clean

demo: $(VENV)/demo.stamp
	$(BIN)/handheld ship efficientformerv2_s0 --out out

test: lint types tests apple

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

tests: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow"

# Apple's own tests in the installed coremltools, with predictions by handheld's Core ML runtime: a sample of more than
# 2,000 over all operators. apple-full runs all 43,000, of which 36,000 predict: an hour.
apple: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/apple/run.py -n 2 --one-in 25 --at-least 2000

apple-full: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/apple/run.py -n 2

# Every network of the zoo at full size in every format, fp32 and fp16, executed where a runtime exists: a night, 14 GB
# of memory, 30 GB of disk. Goes on where it was. zoo-tiny is the same for the tiny twins: half an hour.
zoo: $(VENV)/dev.stamp
	$(BIN)/handheld check --zoo out/zoo

zoo-tiny: $(VENV)/dev.stamp
	$(BIN)/handheld check --zoo out/zoo-tiny --tiny

# Every recipe in every format, of every tiny twin: exported, executed, compared. Hours.
RECIPES = w8,w8a8,w8a16,w4,w4c,lut8,lut6,lut4,lut4g16,lut4-w8,lut3,lut2,lut1,sparse50,sparse2of4,sparse50-w8,sparse50-lut4,levels1,levels2,levels4

matrix: $(VENV)/dev.stamp
	$(BIN)/handheld check --zoo out/matrix --tiny --recipe $(RECIPES)

# The Core ML runtime beside eager PyTorch, on this machine.
bench-coreml: $(VENV)/dev.stamp
	$(BIN)/handheld export efficientformerv2_s0 --to coreml --recipe fp16 --out out/bench-coreml
	$(BIN)/handheld export efficientformerv2_s0 --to coreml,coreai --recipe fp32 --out out/bench-coreml
	$(BIN)/python -m handheld.benchmarks.coreml out/bench-coreml

# Each of the most used operators broken in every way: the tests must notice. Ten minutes.
mutations: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/host/coreml_mutations.py

# 2,000 damaged files of each format, loaded and run: a quarter of an hour at most.
damage: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/host/damage.py out/damage 2000

# Thirty kinds of faults planted in files of every format: caught, and located. Writes docs/faults.md.
faults: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m handheld.benchmarks.faults --out docs/faults.md

# Killed a hundred times at random moments: ten minutes.
kills: $(VENV)/dev.stamp
	HANDHELD_KILLS=100 $(PYTEST) -n 0 tests/host/test_kills.py

test-slow: $(VENV)/dev.stamp
	$(PYTEST) -m slow

# Ten minutes of random networks on every format: what the converters get wrong. Ends with an error if it finds anything.
fuzz: $(VENV)/dev.stamp
	$(BIN)/handheld fuzz --minutes 10 --seed $(shell date +%s) --out out/fuzz

# Exports that must all pass: some 50 random networks on five formats, and the zoo. Half an hour.
false-alarms: $(VENV)/dev.stamp
	$(BIN)/handheld fuzz --seed 1000 --count 100 --out out/false-alarms/fuzz
	for model in s0 s1 s2 l; do $(BIN)/handheld export efficientformerv2_$$model --out out/false-alarms/zoo || exit 1; done
	$(BIN)/handheld check out/false-alarms/zoo --require coreml,coreai,litert,executorch,onnx

# Side by side with each converter's defaults, on this machine: a quarter of an hour.
versus: $(VENV)/dev.stamp
	$(BIN)/python -m handheld.benchmarks.versus --out out/versus

# handheld's recipes beside the vendors' own quantizers, same inputs: half an hour. Writes docs/versus_quantized.md.
versus-quantized: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m handheld.benchmarks.versus.quantized examples/efficientnet_lite0.py:trained
	OMP_NUM_THREADS=1 $(BIN)/python -m handheld.benchmarks.versus.quantized efficientformerv2_s0 \
	  --to litert,executorch,onnx --inputs 20

# What recipes cost three networks with trained weights, in every format: hours. Writes docs/accuracy.md. The light field
# is trained first: python examples/light_field.py. Goes on where it was.
ACCURACY = OMP_NUM_THREADS=1 $(BIN)/python -m handheld.benchmarks.accuracy --latency

accuracy: $(VENV)/dev.stamp
	$(ACCURACY) examples/efficientnet_lite0.py:trained --quality top1 --fewer coreml=40 --fewer coreai=10 \
	  --recipes w8,export/recipes/lut6_depthwise8.toml,w4,lut4g16,fp32,w8a8
	$(ACCURACY) examples/minilm.py:trained --quality vectors --fewer coreai=8 \
	  --recipes w8,lut4g16,fp32,examples/minilm_w8a8.toml
	$(ACCURACY) examples/light_field.py:network --fewer coreml=4 --fewer coreai=2 --recipes w8,levels2,fp32,w8a8 --docs docs

# What the steps that win accuracy back are worth, of two of them, and torchao's training beside ours: forty minutes. Prints
# docs/recovery.md's figures. The light field is trained first, as for accuracy.
RECOVERY = OMP_NUM_THREADS=1 $(BIN)/python -m handheld.benchmarks.accuracy --to onnx --out out/recovery

recovery: $(VENV)/dev.stamp
	$(RECOVERY) examples/light_field.py:network --recipes w8a8,w8a8-gptq,w8a8-gptq-matched,w8a8-gptq-qat,w4c,w4c-gptq,w4c-gptq-matched,w4c-gptq-tuned,w4c-gptq-qat,lut4,lut4-gptq,lut4-gptq-tuned,levels2,levels2-gptq,levels2-gptq-qat
	$(RECOVERY) examples/efficientnet_lite0.py:trained --quality top1 --recipes w8,w8-gptq,w8a8,w8a8-gptq,w8a8-matched,w8a8-gptq-matched,w8a8-gptq-qat,w4c,w4c-gptq,w4c-matched,w4c-gptq-matched,w4c-gptq-tuned,lut4,lut4-gptq,lut4-gptq-matched,levels2,levels2-gptq,levels2-gptq-matched
	OMP_NUM_THREADS=1 $(BIN)/python -m handheld.benchmarks.versus.qat examples/light_field.py:network

# The built wheel in an environment of its own, used from outside the checkout.
wheel: $(VENV)/dev.stamp
	rm -rf dist && $(BIN)/python -m build --wheel --outdir dist .
	sh tests/wheel.sh $(PYTHON) dist/*.whl

schemas: $(VENV)/dev.stamp
	$(BIN)/python -m handheld.schemas

$(VENV)/pip.stamp:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo.stamp: $(VENV)/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet -e '.[all]'
	touch $@

# timm is what our networks are compared with. It asks for torchvision, whose PyPI build does not fit a CPU build of
# torch; both come without dependencies, and tests/timm_module.py bridges the gap.
$(VENV)/dev.stamp: $(VENV)/pip.stamp pyproject.toml
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps timm==1.0.31 torchvision==0.28.0
	touch $@

clean:
	rm -rf $(VENV) out dist build .mypy_cache .pytest_cache .ruff_cache
