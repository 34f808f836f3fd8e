"""Tests which libraries a rank imports before its first step, since a large one takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HELP = "import runpy; runpy.run_path('dist_clm_train.py', run_name='__main__')"
LARGE = ["datasets", "matplotlib", "pandas", "pyarrow", "sympy", "torch._dynamo", "wandb"]
REPORT = """
import atexit, json, os, sys
atexit.register(lambda: os.write(2, b"\\n" + json.dumps(sorted(sys.modules)).encode()))
"""
SESSION = """
from pathlib import Path
import training.session
from modules.layers.activation import FUSED
from modules.registry import MODELS
from modules.stage_model import StageModel
from tasks.open import open_source
from transformers import GPTJConfig, GPTNeoXConfig, Qwen3Config

open_source("text.jsonl")
sizes = {"vocab_size": 8, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
grouped = {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 8}
for activation in FUSED:
    for name, config in (
        ("gptneox", GPTNeoXConfig(**sizes, hidden_act=activation)),
        ("gptj", GPTJConfig(**sizes, rotary_dim=4, activation_function=activation)),
        ("qwen3", Qwen3Config(**sizes, **grouped, hidden_act=activation)),
    ):
        family = MODELS[name].load()
        family.check_config(config)
        StageModel(family, config, range(3), device="cpu")
"""


def imported_by(code: str, *arguments: str, folder: Path) -> set[str]:
    """Runs the code in a process, which must end without error; returns the imported modules."""
    command = [sys.executable, "-c", REPORT + code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_imports_neither_torch_nor_transformers(flag: str) -> None:
    assert imported_by(HELP, flag, folder=ROOT).isdisjoint({"torch", "transformers", "numpy"})


def test_a_rank_imports_no_library_that_its_model_does_not_need(tmp_path: Path) -> None:
    """For a model on CPU with any usual activation function, a rank imports no large library.

    llama is not tried: since transformers 5, the file of its config imports ACT2FN.
    """
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    imported = imported_by(SESSION, folder=tmp_path)
    assert "training.run" in imported
    assert imported.isdisjoint(LARGE)
