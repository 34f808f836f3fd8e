"""Tests that a conversion's peak memory does not grow with the number of layers.

Each conversion runs in a new process, so that the process's peak is the peak of the conversion.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig

from checkpoint.files import hf_weights as hf_files
from checkpoint.files.validation import module_shapes
from modules.families.gptneox import FAMILY
from modules.stage_model import StageModel
from pipeline_parallel.partition.split import stage_modules
from tests.support.checkpoint_models import to_hf, to_shards
from tests.support.launcher import run_ranks

HIDDEN = 320


def build(form: str, layers: int, folder: Path) -> None:
    folder.mkdir()
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 5, "intermediate_size": 4 * HIDDEN}
    config = GPTNeoXConfig(**sizes, num_hidden_layers=layers, vocab_size=2048)
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
        shapes = module_shapes(FAMILY, config, index)
        state |= {names[key]: torch.full(shape, 0.01) for key, shape in shapes.items()}
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")


def resident(line: str) -> int:
    """Returns the value of a line of /proc/self/status, such as VmRSS, in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{line}:")[2].split()[0]) * 1024


def convert(_rank: int, _world: int, _url: str, form: str, layers: int, folder: Path) -> int:
    """Converts a model; returns this process's peak memory minus its memory before, in bytes."""
    hf_files.SHARD_BYTES = 15_000_000
    before = resident("VmRSS")
    if form == "checkpoint":
        to_hf(folder, folder / "result", n_stages=2, n_layer_per_stage=layers // 2)
    else:
        to_shards(folder, folder / "result")
    return resident("VmHWM") - before


@pytest.mark.parametrize("form", ["safetensors", "bin", "checkpoint"])
def test_peak_memory_does_not_grow_with_layers(form: str, tmp_path: Path) -> None:
    """Twelve more layers raise the peak by less than a fifth of the bytes of these layers."""
    peaks = []
    for layers in (12, 24):
        folder = tmp_path / str(layers)
        build(form, layers, folder)
        peaks += run_ranks(1, convert, form, layers, folder)
    assert abs(peaks[1] - peaks[0]) < 0.2 * 12 * 4 * 12 * HIDDEN**2, peaks
