"""The model, data and checkpoints with which a run starts, and the step that it continues from."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments.settings import Settings
from checkpoint.files.layer_shards import check_shard
from checkpoint.retention import RetentionPolicy
from checkpoint.store import CheckpointStore, ResumePoint
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.run_context import RunContext
from modules.families.base import Family
from modules.registry import MODELS
from pipeline_parallel.partition.split import Split
from pipeline_parallel.partition.stage_split import StageSplit
from planning.memory.dry_run import PlannedModel
from training.data import TrainingData, checkpoint_extras
from training.resume import find_resume


@dataclass(frozen=True)
class RunStart:
    """The model, data and checkpoint that a run starts with.

    Attributes:
        split: the split of the layers that --num-layers gives if there is no checkpoint.
        layers: the split that the run uses.
        source: the split with which the checkpoint was saved.
        data: the training data and held-out data on rank 0; None on other ranks.
        point: the checkpoint to continue from; None without one.
    """

    family: Family
    config: Any
    split: StageSplit
    layers: Split
    source: Split
    data: TrainingData | None
    store: CheckpointStore
    point: ResumePoint | None

    @property
    def planned(self) -> PlannedModel:
        """Returns the model and its split in the form that the memory plan needs."""
        return PlannedModel(self.family, self.config, self.layers)

    @property
    def step(self) -> int:
        """Returns the number of steps that are done already."""
        return 0 if self.point is None else self.point.step


def open_run(settings: Settings, context: RunContext) -> RunStart:
    """Reads the config and finds the checkpoint to continue from; every process calls it.

    Raises:
        ValueError: a file is invalid or belongs to another run; the text names the file.
    """
    model, topology = settings.model, context.topology
    check_shard(model.model_name / "config.json")
    family: Family = MODELS[model.model_type].load()
    config = family.load_config(model.model_name)
    split = StageSplit(
        model.num_layers,
        family.sizes(config),
        num_stages=topology.num_stages,
        seq_len=settings.update.seq_length,
    )
    _check_same_config(model.model_name, context.control)
    data = TrainingData(settings, vocab_size=config.vocab_size) if context.rank == 0 else None
    extras = {}
    if data is not None:
        extras = checkpoint_extras(model.model_name, model.tokenizer_name, data.tokenizer)
    checkpoint = settings.checkpoint
    store = CheckpointStore(
        checkpoint.checkpoint_path,
        control=context.control,
        topology=topology,
        nonce=context.start,
        extras=extras,
        policy=RetentionPolicy(checkpoint.keep_checkpoints, checkpoint.keep_optimizer_states),
    )
    point, layers, source = find_resume(settings, context, store=store, split=split)
    return RunStart(family, config, split, layers, source, data, store, point)


def _check_same_config(model_name: Path, control: Communicator) -> None:
    """Raises ValueError on every rank if config.json in `model_name` differs between ranks."""
    config = json.loads((model_name / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    digests = gather_json(control, digest)
    other = next((rank for rank, one in enumerate(digests) if one != digests[0]), None)
    if other is not None:
        raise ValueError(
            f"--model-name {model_name}: config.json is not the same on rank 0 and rank {other}"
        )
