# make demo   the pipeline on a synthetic sample, then two fields of real tissue: from nothing to pictures
#             (no download but the packages)
# make test   lint and all tests
# make test-lowest   all tests with the lowest versions that requirements.txt allows (some 3 GB to download)
# make mitos14 DATA=folder   the pipeline on MITOS-ATYPIA-14, less than an hour on 2 cores
# make gpu    what needs a GPU: checks, speed, a training; at most 8 minutes (tests/README.md)
PYTHON ?= python3
RUN := .venv/bin/python
LOWEST := .venv-lowest/bin/python
INSTALL = $(PYTHON) -m venv .venv && $(RUN) -m pip install --quiet --disable-pip-version-check
TEST := -m pytest -n 3 --dist loadfile --no-loadscope-reorder
LIGHT := --backbone resnet10t --pretrained False --lr 1e-3


# make mitos14 DATA=folder: the nine stages on MITOS-ATYPIA-14 with a light backbone; what is done is not done again.
# WEIGHTS=file: what every training starts from; WEIGHTS= without a file: ImageNet weights from the model hub.
DATA ?=
WEIGHTS ?= weights/dasc_figures.pt
FIELDS14 := --dataset mitos14 --data_root $(DATA) --val H03 --test H05
CUT14 := $(FIELDS14) --patch_size 64 --patch_um_per_px 0.28 --shifts 0 --resume
LIGHT14 := --backbone tf_efficientnet_lite0 --stride 32 $(if $(WEIGHTS),--init_weights $(WEIGHTS))
P14 := data/mitos14
R14 := results/mitos14
resume = $(if $(wildcard $(R14)/$(1)/last.pt),--resume)

.PHONY: demo mitos14 test test-lowest gpu clean

.venv/installed: requirements.txt
	$(INSTALL) -r $<
	touch $@

.venv/installed-dev: requirements-dev.txt requirements.txt
	$(INSTALL) -r $<
	touch .venv/installed $@

demo: .venv/installed
	$(RUN) pre/make_sample.py
	$(RUN) pre/cut_patch_2.py --patch_size 64
	$(RUN) NS/sigle.py $(LIGHT) --epochs 6
	$(RUN) pre/cut_patch_2.py --patch_size 64 --fp_mdoel True
	$(RUN) DMU/main.py $(LIGHT) --batch_size 128 --epochs 8
	$(RUN) clus_hard.py
	$(RUN) DMU/hard_main.py $(LIGHT) --epochs 8
	$(RUN) clus_scl.py
	$(RUN) DMU/hard_scl_main.py $(LIGHT) --epochs 8
	$(RUN) predict.py --dataset sample --data_root data/sample
	$(RUN) predict.py --dataset table --data_root docs/example --model_path weights/dasc_mitos.pt --out results/example
	@echo "Look at report.html and */overlay.png: green true, yellow false, blue missed."
	@echo "  results/predict   synthetic tissue, by the network just trained"
	@echo "  results/example   two fields of real tissue, by weights/dasc_mitos.pt (docs/example/NOTICE.md)"

mitos14: $(R14)/predict/metrics.json
	cat $<

$(P14)/patches.csv: | .venv/installed
	$(RUN) pre/cut_patch_2.py $(CUT14) --out $(@D)

$(R14)/NS/model.pt: $(P14)/patches.csv
	$(RUN) NS/sigle.py $(LIGHT14) --lr 5e-4 --epochs 14 --manifest $< --out $(@D) $(call resume,NS)

$(P14)_ns/patches.csv: $(R14)/NS/model.pt
	$(RUN) pre/cut_patch_2.py $(CUT14) --fp_mdoel True --model_path $< --out $(@D)

$(R14)/DMU/memory.csv: $(P14)_ns/patches.csv
	$(RUN) DMU/main.py $(LIGHT14) --lr 3e-4 --epochs 10 --warmup_share 0.1 --batch_size 64 \
		--manifest $< --out $(@D) $(call resume,DMU)

$(R14)/DMU/hard.csv: $(R14)/DMU/memory.csv
	$(RUN) clus_hard.py --manifest $(P14)_ns/patches.csv --memory $< --out $(@D)

$(R14)/DMU_hard/checked.csv: $(R14)/DMU/hard.csv
	$(RUN) DMU/hard_main.py $(LIGHT14) --lr 3e-4 --epochs 12 --seen_after_share 0.25 \
		--manifest $(P14)_ns/patches.csv --hard $< --out $(@D) $(call resume,DMU_hard)

$(R14)/DMU_hard/SCL.csv: $(R14)/DMU_hard/checked.csv
	$(RUN) clus_scl.py --memory $(R14)/DMU/memory.csv --hard $(R14)/DMU/hard.csv --checked $< --out $(@D)

$(R14)/DMU_scl/model.pt: $(R14)/DMU_hard/SCL.csv
	$(RUN) DMU/hard_scl_main.py $(LIGHT14) --lr 5e-4 --epochs 15 --contrast_labels_share 0.2 --cluster_every_share 0.2 \
		--manifest $(P14)_ns/patches.csv --scl $< --out $(@D) $(call resume,DMU_scl)

$(R14)/predict/metrics.json: $(R14)/DMU_scl/model.pt
	$(RUN) predict.py $(FIELDS14) --model_path $< --out $(@D)

test: .venv/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) $(TEST)

.venv-lowest/installed: constraints-lowest.txt requirements-dev.txt requirements.txt
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c $<
	touch $@

test-lowest: .venv-lowest/installed
	$(LOWEST) $(TEST)

# make gpu: PATCHES=file of `python tests/gpu.py --pack`; without it a synthetic sample is trained on.
# RUN=python3: with the packages that are installed already, so that nothing is downloaded. GPU=flags of tests/gpu.py.
PATCHES ?=
GPU ?=

gpu: $(if $(filter .venv/%,$(RUN)),.venv/installed)
	$(RUN) tests/gpu.py $(if $(PATCHES),--patches $(PATCHES)) $(GPU)

clean:
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache .hypothesis
