"""Conversion never holds a whole model: twice the layers take the same peak memory (VmHWM).

One process imports the libraries and forks a child per conversion, so that each child's peak is its
own and the costly import is paid once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# Prints {"<form> <layers>": peak in kB}. Arguments: folder, hidden size, bytes of an output shard.
MEASURE = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig
from checkpoint.files import hf_weights as hf_files
from checkpoint.conversion.from_hf import convert_from_hf
from checkpoint.conversion.to_hf import convert_to_hf
from modules.families.gptneox import FAMILY
from modules.stage_model import StageModel
from pipeline_parallel.partition.split import stage_modules

base, hidden, hf_files.SHARD_BYTES = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def in_child(work, *args):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        work(*args)
        status = open("/proc/self/status").read()
        os.write(write, status.partition("VmHWM:")[2].split()[0].encode())
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    return int(os.read(read, 100))

def build(form, layers, folder):
    folder.mkdir()
    config = GPTNeoXConfig(
        hidden_size=hidden, num_attention_heads=hidden // 64, num_hidden_layers=layers,
        intermediate_size=4 * hidden, vocab_size=2048)
    config.save_pretrained(folder)
    if form == "checkpoint":
        for stage in (0, 1):
            indices = stage_modules(stage, (layers // 2, layers // 2))
            state = StageModel(FAMILY, config, indices, device="meta").state_dict()
            state = {key: torch.full(value.shape, 0.01) for key, value in state.items()}
            torch.save(state, folder / f"prank_{stage}_checkpoint.pt")
        return
    state = {}
    for index in range(layers + 2):
        names = hf_files.hf_names(FAMILY, config, index)
        shapes = hf_files.module_shapes(FAMILY, config, index)
        state |= {names[key]: torch.full(shape, 0.01) for key, shape in shapes.items()}
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")

def convert(form, layers, folder):
    if form == "checkpoint":
        convert_to_hf(
            FAMILY, ckpt_path=folder, save_path=base / "result", n_stages=2,
            n_layer_per_stage=layers // 2, config_name=None, fp16=False, verify=False)
    else:
        convert_from_hf(FAMILY, model_name=str(folder), save_dir=base / "result", dtype="keep")

peaks = {}
for form in ("safetensors", "bin", "checkpoint"):
    for layers in (12, 24):
        folder = base / f"{form}{layers}"
        in_child(build, form, layers, folder)
        peaks[f"{form} {layers}"] = in_child(convert, form, layers, folder)
        in_child(os.system, f"rm -r {folder} {base / 'result'}")
print(json.dumps(peaks))
"""


def measure(folder: Path, hidden: int, shard_bytes: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(hidden), str(shard_bytes)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    peaks: dict[str, int] = json.loads(done.stdout)
    return peaks


@pytest.mark.parametrize(
    ("hidden", "shard_bytes"),
    [
        pytest.param(320, 15_000_000, id="0.06 and 0.12 GB"),
        pytest.param(896, 256_000_000, id="0.5 and 1 GB", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_does_not_grow_with_layers(
    hidden: int, shard_bytes: int, tmp_path: Path
) -> None:
    peaks = measure(tmp_path, hidden, shard_bytes)
    print(peaks)
    for form in ("safetensors", "bin", "checkpoint"):
        few, many = peaks[f"{form} 12"], peaks[f"{form} 24"]
        assert abs(many - few) < 0.1 * few, peaks
