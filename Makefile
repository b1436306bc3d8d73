PYTHON ?= python3
BIN = .venv/bin
LABEL = .venv-monailabel

.PHONY: demo test most-tests label-environment lint stress

demo: .venv/installed
	$(BIN)/python -m scripts demo

# MONAI Label's environment is made meanwhile; a worker and the processes that it begins take up to 3 GB of memory
test: .venv/installed lint
	$(MAKE) --jobs 2 label-environment most-tests
	$(BIN)/python -m pytest -rs tests/test_monailabel.py

most-tests:
	$(BIN)/python -m pytest -rs --numprocesses auto --maxprocesses 4 --dist worksteal --ignore tests/test_monailabel.py

label-environment:
	-$(MAKE) $(LABEL)/installed

# the long form of the tests with kills and damaged files
stress: .venv/installed
	STRESS=1 $(BIN)/python -m pytest -s tests/test_faults.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

# for the test of MONAI Label, which is skipped where this can't be built; PyTorch comes first, and no package is built
# apart from it, as one of them (sam2) would fetch another PyTorch for that
$(LABEL)/installed: requirements-monailabel.txt
	$(PYTHON) -m venv --clear $(LABEL)
	$(LABEL)/bin/pip install --quiet $$(grep ^torch== requirements-monailabel.txt)
	$(LABEL)/bin/pip install --quiet --no-build-isolation --requirement requirements-monailabel.txt
	touch $@
