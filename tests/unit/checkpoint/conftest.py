"""Fixture with models for the tests of `checkpoint/`; a test damages only a copy of a model."""

from pathlib import Path

import pytest

from tests.support.checkpoint_models import (
    copy_config,
    make_checkpoint,
    make_model,
    save_model,
    step_meta,
    to_shards,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a NeoX model in five formats, one folder each; `ck` is a checkpoint of two stages."""
    base = tmp_path_factory.mktemp("originals")
    model = make_model("gptneox")
    for folder, form in (("st", "single"), ("many", "sharded"), ("bin", "bin")):
        save_model(model, base / folder, form)
    to_shards(base / "st", base / "made").rename(base / "shards")
    make_checkpoint(base / "shards", base / "ck", counts=(2, 1), meta=step_meta(7, (2, 1)))
    copy_config(base / "shards", base / "ck")
    return base
