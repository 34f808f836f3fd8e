"""A model without weights, which is enough for --check-cluster, and flags for --check-cluster."""

import json
from pathlib import Path
from typing import Any

from tests.support.flags import flags_of
from tests.support.models import make_hf
from tests.support.valid_run import right

SHARDS = ["pytorch_embs.pt", *(f"pytorch_{i}.pt" for i in range(8)), "pytorch_lm_head.pt"]


def make_model(folder: Path, **changes: Any) -> Path:
    """Writes config.json of a model with 8 layers, and an empty file in place of each shard."""
    make_hf("gptneox", vocab_size=400, num_hidden_layers=8).config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for name in SHARDS:
        (folder / name).touch()
    return folder


def flags(home: Path, **more: Any) -> dict[str, Any]:
    """Returns flags of a run whose model is in `home`/m and whose data does not exist."""
    own = f"--task-name {home}/none.jsonl --checkpoint-path {home}/none --check-cluster"
    return right(home) | flags_of(own) | {"num-layers": 4} | more
