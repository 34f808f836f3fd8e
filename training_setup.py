"""Builds a run from its flags: data, stage, optimizer, checkpoints, records; then trains.

Imported only after the flags have been checked, since it brings torch with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comm.fabric import Fabric

from argument_checks import check_split
from checkpoint.disk import check_disk
from checkpoint.loading import initialise_model_, load_checkpoint_, load_shards_, share_from_first
from checkpoint.model_folder import COMPANIONS
from checkpoint.training_state import CheckpointStore, ResumePoint, check_same_run, read_part
from comm.messages import gather_json
from comm.topology import Topology
from data_parallel.flat_gradients import FlatGradients, same_on_all
from modules.family import Family
from modules.layers import make_layer
from modules.registry import MODELS
from modules.stage_model import StageModel, stage_modules
from monitor.console import Console
from monitor.recorder import Recorder, SilentRecorder, open_recorder
from optimizer.adam import Adam
from optimizer.agreement import Agreement
from pipeline_parallel.channel import PipelineChannel
from pipeline_parallel.engine import Engine
from pipeline_parallel.feed import HostBatch, Scatter, TrainingFeed
from pipeline_parallel.schedule import SCHEDULES
from pipeline_parallel.stage import Stage
from tasks.build import open_training_stream
from tasks.evaluation import evaluation_batches
from tasks.loader import BatchLoader
from tasks.tokenizer import check_vocabulary, load_tokenizer
from training_loop import Evaluation, LoopSettings, TrainingLoop

logger = logging.getLogger(__name__)

# Flags that a resumed run must share with its checkpoint; see SPEC-like list in README.md.
FIXED = (
    "model_type",
    "pipeline_group_size",
    "num_layers",
    "seq_length",
    "micro_batch_size",
    "gradient_accumulate_step",
    "optimizer",
    "task_name",
    "doc_separator",
    "seed",
)
# Flags that may change, of which a resumed run says so.
FREE = (
    "total_steps",
    "lr",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "batch_size",
    "data_group_size",
    "checkpoint_steps",
    "evaluation_data",
    "evaluation_steps",
    "evaluation_num_batch",
    "recompute",
)
MOMENTS_AND_WEIGHTS = 3  # fp32 numbers that a checkpoint keeps of each parameter


def train(
    args: argparse.Namespace,
    *,
    topology: Topology,
    fabric: Fabric,
    device: torch.device,
    nonce: str,
    console: Console,
) -> None:
    """Trains as the flags say. ValueError for a user's mistake."""
    run = Run(args, topology=topology, fabric=fabric, device=device, nonce=nonce)
    if run.start >= args.total_steps:
        logger.info("%d of %d steps are done: nothing to do", run.start, args.total_steps)
        return
    run.prepare()
    recorder = run.open_recorder(console)
    try:
        run.loop(recorder).run(run.start)
    finally:
        recorder.close()
        run.close()


class Run:
    """One process's part of a run."""

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        topology: Topology,
        fabric: Fabric,
        device: torch.device,
        nonce: str,
    ) -> None:
        self._args, self._topology, self._fabric, self._device = args, topology, fabric, device
        self._family: Family = MODELS[args.model_type].load()
        self._config = self._family.load_config(args.model_name)
        check_split(args.num_layers, topology.num_stages, self._config.num_hidden_layers)
        self._check_same_config()
        self._tokenizer = load_tokenizer(args.tokenizer_name) if topology.rank == 0 else None
        if self._tokenizer is not None:
            check_vocabulary(self._tokenizer, self._config.vocab_size)
        self._store = CheckpointStore(
            args.checkpoint_path,
            control=fabric.control,
            topology=topology,
            nonce=nonce,
            extras=self._extras(),
        )
        self._resume = self._find_resume()
        self.start = 0 if self._resume is None else self._resume.step
        self._loader: BatchLoader | None = None

    def prepare(self) -> None:
        """Reads weights and state, and checks that the checkpoints to come will fit."""
        self._model = self._build_model()
        self._optimizer = Adam(
            dict(self._model.named_parameters()), weight_decay=self._args.weight_decay
        )
        self._check_disk()
        self._load()
        self._gradients = FlatGradients(self._model.parameters())

    # ---- what the machine and the other ranks have ----

    def _check_same_config(self) -> None:
        raw = json.loads((self._args.model_name / "config.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
        found = gather_json(self._fabric.control, digest)
        other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise ValueError(
                f"--model-name {self._args.model_name}: config.json is not the same on rank 0 and "
                f"rank {other}"
            )

    def _extras(self) -> dict[str, bytes]:
        """The small files that every checkpoint holds: config.json and tokenizer, by name."""
        folder = Path(self._args.tokenizer_name)
        if folder.is_dir():
            files = _companions(folder)
        elif self._tokenizer is not None:
            with tempfile.TemporaryDirectory() as saved:
                self._tokenizer.save_pretrained(saved)
                files = _companions(Path(saved))
        else:
            files = {}
        return {**files, "config.json": (self._args.model_name / "config.json").read_bytes()}

    def _check_disk(self) -> None:
        every = self._args.checkpoint_steps or self._args.total_steps
        saves = -(-(self._args.total_steps - self.start) // every)
        parameters = sum(p.numel() for p in self._model.parameters())
        writes = self._topology.replica == 0
        needed = saves * parameters * MOMENTS_AND_WEIGHTS * 4 if writes else 0
        check_disk(self._fabric.control, self._args.checkpoint_path, needed=needed)

    # ---- weights and state ----

    def _find_resume(self) -> ResumePoint | None:
        path = self._args.checkpoint_path
        if not self._args.load_checkpoint:
            if self._store.exists():
                raise ValueError(
                    f"--load-checkpoint false, but --checkpoint-path {path} has a checkpoint: name "
                    "another folder, or move it away"
                )
            return None
        point = self._store.find()
        if point is None or point.meta is None:
            return point
        check_same_run(point.meta, self._fixed_flags())
        self._check_checkpoint_config(point.folder)
        self._tell_changes(point.meta)
        return point

    def _fixed_flags(self) -> dict[str, Any]:
        flags = {_flag(name): getattr(self._args, name) for name in FIXED}
        rows = self._args.batch_size * self._topology.num_replicas
        return {**flags, "the global batch (--batch-size x --data-group-size)": rows,
                "the precision": "fp32"}  # fmt: skip

    def _free_flags(self) -> dict[str, Any]:
        return {_flag(name): getattr(self._args, name) for name in FREE}

    def _check_checkpoint_config(self, folder: Path) -> None:
        if self._topology.replica != 0:
            return
        kept = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        path = self._args.model_name / "config.json"
        now = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted(kept.keys() | now.keys()):
            if kept.get(key) != now.get(key):
                raise ValueError(
                    f"--model-name {self._args.model_name}: {key} is {now.get(key)!r}, but the "
                    f"checkpoint {folder} was made with {kept.get(key)!r}"
                )

    def _tell_changes(self, meta: dict[str, Any]) -> None:
        if self._topology.rank != 0:
            return
        kept = meta.get("settings", {})
        for flag, value in self._free_flags().items():
            if kept.get(flag) != value:
                logger.info("%s is now %s, it was %s", flag, value, kept.get(flag))

    def _build_model(self) -> StageModel:
        return StageModel(
            self._family,
            self._config,
            stage_modules(
                self._topology.stage,
                num_stages=self._topology.num_stages,
                num_layers=self._args.num_layers,
                model_layers=self._config.num_hidden_layers,
            ),
            device=self._device,
        )

    def _load(self) -> None:
        args, resume = self._args, self._resume
        if resume is None:
            if args.load_pretrained_model:
                load_shards_(self._model, args.model_name, self._family, self._config)
            else:
                initialise_model_(self._model, self._config, seed=args.seed)
            self._check_same_weights()
            return
        if self._topology.replica == 0:
            load_checkpoint_(
                self._model, resume.folder, self._topology.stage, self._family, self._config
            )
        share_from_first(self._model.parameters(), self._fabric.replicas)
        if resume.meta is None:
            logger.info("weights from %s alone: step 0, fresh optimizer", resume.folder)
            return
        if self._topology.replica == 0:
            state = read_part(resume.folder, self._topology.stage, "optimizer")
            self._optimizer.load_state(state)
        share_from_first(self._optimizer.tensors(), self._fabric.replicas)
        self._optimizer.set_updates(resume.meta["updates"])
        logger.info("resumed from step %d of %s", resume.step, args.checkpoint_path)

    def _check_same_weights(self) -> None:
        if not same_on_all(self._model.parameters(), self._fabric.replicas):
            raise ValueError(
                f"--model-name {self._args.model_name}: the shards of stage "
                f"{self._topology.stage} are not the same for all replicas"
            )

    # ---- the parts of the loop ----

    def open_recorder(self, console: Console) -> Recorder:
        if self._topology.rank != 0:
            return SilentRecorder()
        args, meta = self._args, None if self._resume is None else self._resume.meta
        return open_recorder(
            args.checkpoint_path,
            console=console,
            total_steps=args.total_steps,
            resumed_step=self.start or None,
            project=args.project_name,
            config={**self._fixed_flags(), **self._free_flags()},
            run_id=None if meta is None else meta.get("wandb_id"),
        )

    def loop(self, recorder: Recorder) -> TrainingLoop:
        args, topology, fabric = self._args, self._topology, self._fabric
        settings = self._settings()
        engine = self._engine(settings)
        agreement = self._agreement()
        scatter = Scatter(
            fabric.control, topology, rows=settings.rows, tokens=settings.tokens,
            device=self._device,
        )  # fmt: skip
        return TrainingLoop(
            settings,
            topology=topology,
            replicas=fabric.replicas,
            engine=engine,
            feed=self._feed(settings),
            gradients=self._gradients,
            optimizer=self._optimizer,
            agreement=agreement,
            evaluation=None
            if args.evaluation_data is None
            else Evaluation(
                scatter, fabric.control, engine, agreement, settings.micro_rows,
                self._open_evaluation if topology.rank == 0 else None,
            ),
            recorder=recorder,
            save=partial(self._save, recorder),
        )  # fmt: skip

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def _settings(self) -> LoopSettings:
        args = self._args
        return LoopSettings(
            total_steps=args.total_steps,
            accumulate=args.gradient_accumulate_step,
            rows=args.batch_size,
            micro_rows=args.micro_batch_size,
            tokens=args.seq_length,
            lr=args.lr,
            warmup_updates=args.warmup_steps,
            max_grad_norm=args.max_grad_norm,
            checkpoint_steps=args.checkpoint_steps,
            evaluation_steps=args.evaluation_steps,
            seed=args.seed,
        )

    def _engine(self, settings: LoopSettings) -> Engine:
        stage = Stage(
            self._model,
            recompute=self._args.recompute,
            loss_scale=1.0 / settings.nominal_tokens(self._topology.num_replicas),
        )
        channel = PipelineChannel(
            self._fabric.pipeline,
            shape=(settings.micro_rows, settings.tokens, self._config.hidden_size),
            dtype=torch.float32,
            device=self._device,
        )
        return Engine(
            stage,
            channel,
            schedule=SCHEDULES[self._args.pp_mode],
            stage_index=self._topology.stage,
            num_stages=self._topology.num_stages,
            num_microbatches=settings.rows // settings.micro_rows,
        )

    def _agreement(self) -> Agreement:
        counts = [
            len(list(make_layer(self._family, self._config, index, "meta").parameters()))
            for index in range(self._config.num_hidden_layers + 2)
        ]
        return Agreement(
            self._fabric.control,
            self._topology,
            norm_slots=sum(counts),
            first_slot=sum(counts[: self._model.indices.start]),
        )

    def _feed(self, settings: LoopSettings) -> TrainingFeed:
        args = self._args
        if self._topology.rank == 0:
            stream = open_training_stream(
                args.sources,
                self._tokenizer,
                seq_length=args.seq_length,
                seed=args.seed,
                separator=args.doc_separator,
            )
            if self._resume is not None and self._resume.meta is not None:
                stream.restore(self._resume.meta["data"])
            self._loader = BatchLoader(stream, rows=args.batch_size * args.data_group_size)
        scatter = Scatter(
            self._fabric.control, self._topology, rows=settings.rows, tokens=settings.tokens,
            device=self._device,
        )  # fmt: skip
        return TrainingFeed(scatter, self._loader, num_batches=args.total_steps - self.start)

    def _open_evaluation(self) -> Iterator[HostBatch]:
        args = self._args
        return evaluation_batches(
            args.evaluation_data,
            self._tokenizer,
            seq_length=args.seq_length,
            rows=args.batch_size * args.data_group_size,
            separator=args.doc_separator,
            max_batches=args.evaluation_num_batch,
        )

    def _save(self, recorder: Recorder, step: int, data: dict[str, Any]) -> None:
        weights = {key: value.cpu() for key, value in self._model.state_dict().items()}
        updates = self._optimizer.updates
        meta = {
            "step": step,
            "updates": updates,
            "model_type": self._args.model_type,
            "num_stages": self._topology.num_stages,
            "num_layers": self._layers_per_stage(),
            "flags": self._fixed_flags(),
            "settings": self._free_flags(),
            "data": data,
            "wandb_id": recorder.run_id,
        }
        parts = {
            "checkpoint": weights,
            "optimizer": self._optimizer.state(),
            "scheduler": {"kind": "linear", "step": step, "updates": updates},
        }
        self._store.save(step, parts=parts, meta=meta)

    def _layers_per_stage(self) -> list[int]:
        n, layers = self._args.num_layers, self._config.num_hidden_layers
        return [min(n, layers - stage * n) for stage in range(self._topology.num_stages)]


def _companions(folder: Path) -> dict[str, bytes]:
    paths = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(paths)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
