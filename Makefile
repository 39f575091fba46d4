# make demo      environment, then a PNG of prompts from the small weights in pocket/
# make lesson    docs/lesson.py: its ten figures into docs/figures/, minutes
# make notebook  the same as lesson.ipynb, executed
# make test      the same environment, then the tests that a change should pass: minutes
# make test-all  all tests; both in two processes of one thread each
# make pocket    trains pocket weights from nothing, on two cores: A beside the text tower and the
#                compressor, then B, then C; each says after five steps how long it will take
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo lesson notebook test test-all pocket pocket-a pocket-compressor clean

demo: .venv/ready
	$(BIN)/python sample.py --out demo.png --n 4 \
	    "a large red circle on a white background" "a blue square on a black background" \
	    "a yellow star above a purple heart" "a green triangle left of a pink cross"
	@echo "The pictures are in demo.png: one row for each prompt, four tries."

lesson: .venv/ready-dev
	MPLBACKEND=Agg $(BIN)/python docs/lesson.py

notebook: .venv/ready-dev
	$(BIN)/jupytext --to ipynb --set-kernel python3 --execute --output lesson.ipynb docs/lesson.py

test: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" --durations 5

test-all: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 5

pocket: .venv/ready
	$(MAKE) -j2 pocket-a pocket-compressor
	OMP_NUM_THREADS=1 $(BIN)/python stage_b.py --preset pocket --compile --compressor-share 0 \
	    --init-from runs/pocket/taught/checkpoint.pt
	$(BIN)/python stage_c.py --preset pocket --compile
	$(BIN)/python -m pocket.ship

pocket-a: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python stage_a.py --preset pocket

pocket-compressor: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pocket.teach_text
	cp runs/pocket/text/text.safetensors pocket/
	OMP_NUM_THREADS=1 $(BIN)/python -m pocket.teach --compile

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs shards
