# `make` lists the targets. Each one runs in .venv, which `make setup` makes.
.PHONY: help setup check test test-all coverage docs bench

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

setup: ## make .venv with all that training and the tests need
	bash -c 'source example_scripts/venv.sh -r requirements-dev.txt'

check: setup ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy .

test: ## what continuous integration runs: ruff, mypy and the default tests
	bash tests/run.sh

test-all: ## all tests: whole matrices (slow) and drawn faults, too; takes hours
	bash tests/run.sh -m ''

coverage: setup ## the default tests with line coverage of every process, in a table and htmlcov/
	.venv/bin/pytest --numprocesses 4 --dist loadfile \
	  --cov --cov-report term:skip-covered --cov-report html

docs: setup ## write the page of flags and build the site into site/; it needs no network
	.venv/bin/python docs/write_flags.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

bench: setup ## steps of this project beside torch's pipelining, on CPU; takes half an hour
	.venv/bin/python benchmarks/pipeline.py
