# make demo   a dynamic-resolution network trained, evaluated and shown on real images, in minutes on a CPU
# make test   the tests that answer in ten minutes; make test-all adds full-size networks and long trainings
# make convert-env   adds what ResNeSt/convert.py needs (PyTorch, ONNX, MindConverter) to the environment
# Each makes the environment .venv first; set PYTHON to choose the interpreter (3.10 to 3.12).

SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.10 python3,$(if $(shell $(name) -c '' 2>/dev/null && echo yes),$(name))))
ENV := .venv/bin
CONFIG := --config_path config/resnet14_digits_config.yaml
# For a shorter demo, such as make demo SAMPLE="--images 20" TRAIN="--epochs 1"
SAMPLE :=
TRAIN :=
PYTEST := $(ENV)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Installed without their dependencies, see ResNeSt/requirements-convert.txt.
CONVERTER := mindconverter==1.7.0 resnest==0.0.5

.PHONY: demo test test-all bench convert-env check-system
.DELETE_ON_ERROR:

demo: .venv/requirements.stamp
	@set -euo pipefail; export PATH="$(CURDIR)/$(ENV):$$PATH"; \
	python utils/sample_imagenet.py --output data/digits_varied --vary --size 48 --exist_ok $(SAMPLE); \
	cd DRNet; \
	echo "== 1/3 pre-training the classifier on all resolutions"; \
	python train.py --stage pretrain $(CONFIG) $(TRAIN); \
	echo "== 2/3 fine-tuning it with the resolution predictor"; \
	python train.py --stage finetune $(CONFIG) $(TRAIN); \
	echo "== 3/3 evaluating on the held-out images, dynamically and at each resolution"; \
	for size in 48 32 16; do \
	  python eval.py $(CONFIG) --force_resolution $$size --output_dir ../demo/drnet_$$size \
	    --classifier_ckpt output/pretrain/classifier_net.ckpt --predictor_ckpt none > /dev/null; \
	done; \
	python eval.py $(CONFIG) --output_dir ../demo/drnet --predictions ../demo/drnet/predictions.csv; \
	python show.py --results ../demo/drnet --fixed ../demo/drnet_48 ../demo/drnet_32 ../demo/drnet_16 --output ../demo/drnet.png

test: .venv/requirements-dev.stamp
	$(ENV)/python -m ruff check .
	$(ENV)/python -m ruff format --check .
	$(PYTEST) -m "not full" $(PYTEST_ARGS)

test-all: test
	$(PYTEST) -m full $(PYTEST_ARGS)

bench: .venv/requirements-dev.stamp
	$(ENV)/python tests/benchmarks/drnet_routing.py
	$(ENV)/python tests/benchmarks/ddrnet_step.py
	$(ENV)/python tests/benchmarks/ddrnet_input.py
	$(ENV)/python tests/benchmarks/resnest_fused.py
	$(ENV)/python tests/benchmarks/dynamicquant_grouped.py
	$(ENV)/python tests/benchmarks/infer_310.py

convert-env: .venv/requirements-convert.stamp

# The stamps are newer than the requirements they were installed from, so a second run installs nothing.
.venv/requirements.stamp: requirements.txt | check-system .venv/bin/python
	$(ENV)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/requirements-dev.stamp: requirements-dev.txt requirements.txt | check-system .venv/bin/python
	$(ENV)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/requirements.stamp

.venv/requirements-convert.stamp: ResNeSt/requirements-convert.txt requirements.txt | check-system .venv/bin/python
	@echo "installing PyTorch, ONNX and MindConverter; this takes a minute and 1 GB (5 GB where pip's torch brings CUDA)"
	@$(ENV)/python -m pip install --quiet --disable-pip-version-check -r ResNeSt/requirements-convert.txt \
	  && $(ENV)/python -m pip install --quiet --disable-pip-version-check --no-deps $(CONVERTER) \
	  || { echo "error: the conversion packages do not install on $$($(ENV)/python --version), pip's reason is above; they" \
	  "are tested on 3.11: remove .venv and run make convert-env PYTHON=python3.11" >&2; exit 2; }
	@touch $@ .venv/requirements.stamp

.venv/bin/python: | check-system
	@rm -rf .venv
	@echo "making .venv with $(PYTHON); installing takes a few minutes and 3 GB"
	$(PYTHON) -m venv .venv

# Everything that pip cannot install, looked for before anything is made.
check-system:
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python found; install Python 3.10, 3.11 or 3.12 (apt-get install python3 python3-venv)" >&2; exit 2; fi
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "error: $(PYTHON) is not Python 3.10, 3.11 or 3.12; install one of them and run make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: $(PYTHON) lacks its venv module; apt-get install python3-venv" >&2; exit 2; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libGL.so.1"); ctypes.CDLL("libglib-2.0.so.0")' 2>/dev/null \
	  || { echo "error: libGL, which OpenCV loads, is missing; apt-get install libgl1 libglib2.0-0" >&2; exit 2; }
