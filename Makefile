# make demo   the pipeline on a synthetic sample, from nothing to pictures (no download but the packages)
# make test   lint and all tests
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
LIGHT := --backbone resnet10t --pretrained False --lr 1e-3

.PHONY: demo test clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(RUN) pre/make_sample.py
	$(RUN) pre/cut_patch_2.py --patch_size 64
	$(RUN) NS/sigle.py $(LIGHT) --epochs 6
	$(RUN) pre/cut_patch_2.py --patch_size 64 --fp_mdoel True
	$(RUN) DMU/main.py $(LIGHT) --batch_size 128 --epochs 8 --warmup 1 --count_after 2
	$(RUN) clus_hard.py
	$(RUN) DMU/hard_main.py $(LIGHT) --epochs 8 --seen_after 3
	$(RUN) clus_scl.py
	$(RUN) DMU/hard_scl_main.py $(LIGHT) --epochs 8 --warmup 2 --cluster_every 3
	$(RUN) predict.py --dataset sample --data_root data/sample
	@echo "Look at results/predict/report.html and */overlay.png: green true, yellow false, blue missed (synthetic tissue)."

test: .venv/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
