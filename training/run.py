"""Builds a run from its flags: data, stage, optimizer, checkpoints, records; then trains.

Imported only after the flags have been checked, since it brings torch with it.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from arguments.checks import fixed_flags, free_flags
from arguments.settings import loop_settings
from checkpoint.files.layer_shards import check_shard
from checkpoint.files.validation import module_shapes
from checkpoint.retention import RetentionPolicy
from checkpoint.store import CheckpointStore, ResumePoint
from comm.lifecycle.stop_signals import CLOSING, StopRequest, tidying, training
from comm.process_groups import ProcessGroups
from comm.topology import Topology
from common.tensors import DTYPES
from modules.families.base import Family
from modules.matmul.backend import Matmul
from modules.registry import MODELS
from modules.stage_model import StageModel
from monitor.console import Console
from monitor.out_of_memory import is_out_of_memory
from monitor.recorder import Recorder, SilentRecorder, open_recorder
from optimizer.build import build_optimizer, build_update_step
from pipeline_parallel.batch_scatter import BatchFeed, BatchScatter
from pipeline_parallel.build import build_engine
from pipeline_parallel.engine import StageMemoryError
from pipeline_parallel.p2p import StageLink
from pipeline_parallel.partition.split import Split, stage_modules
from pipeline_parallel.partition.stage_split import StageSplit
from planning.memory.measure import MemoryMeasure
from planning.memory.out_of_memory import explain_out_of_memory
from tasks.loader import BatchLoader
from training.checkpointing import Saver, check_room
from training.cpu_matmul import choose_cpu_matmul
from training.data import TrainingData, checkpoint_extras
from training.evaluation import Evaluation
from training.initial_state import load_state_, load_weights_
from training.profiling import TrainingProfile
from training.resume import check_same_on_all, check_success, find_resume
from training.step_totals import build_totals_reducer, names_by_stage
from training.trainer import OutOfMemoryError, Trainer

logger = logging.getLogger(__name__)


def train(
    args: argparse.Namespace,
    *,
    topology: Topology,
    fabric: ProcessGroups,
    device: torch.device,
    nonce: str,
    console: Console,
    stop: StopRequest,
    closing: ExitStack,
    announce: Callable[[str], object],
) -> str | None:
    """Trains as the flags say. ValueError for a user's mistake.

    Returns a line that says so where `stop` ended it early; None where the run is complete. What
    is to be closed then, however it ends, is put on `closing`. `announce` is told where memory
    ran out, before it takes time to find out what helps.
    """
    run = TrainingRun(args, topology=topology, fabric=fabric, device=device, nonce=nonce)
    if run.start >= args.total_steps:
        check_success(run.resume)
        logger.info("%d of %d steps are done: nothing to do", run.start, args.total_steps)
        return None
    with run.explaining_shortage(announce), run.memory.measuring():
        stopped = run.train(console, stop, closing)
    run.tell_memory()
    return stopped


class TrainingRun:
    """One process's part of a run."""

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        topology: Topology,
        fabric: ProcessGroups,
        device: torch.device,
        nonce: str,
    ) -> None:
        self._args, self._topology, self._fabric, self._device = args, topology, fabric, device
        check_shard(args.model_name / "config.json")
        self._family: Family = MODELS[args.model_type].load()
        self._config = self._family.load_config(args.model_name)
        self._split = StageSplit(
            args.num_layers,
            args.model_type,
            self._config,
            num_stages=topology.num_stages,
            tokens=args.seq_length,
        )
        check_same_on_all(args.model_name, fabric.control)
        self._data = (
            TrainingData(args, vocab_size=self._config.vocab_size) if topology.rank == 0 else None
        )
        self._store = CheckpointStore(
            args.checkpoint_path,
            control=fabric.control,
            topology=topology,
            nonce=nonce,
            extras={}
            if self._data is None
            else checkpoint_extras(args.model_name, args.tokenizer_name, self._data.tokenizer),
            keep=RetentionPolicy(args.keep_checkpoints, args.keep_optimizer_states),
        )
        self._settings = loop_settings(args)
        self.resume, self._layers, self._source = find_resume(
            args, store=self._store, split=self._split, topology=topology, control=fabric.control
        )
        self.start = 0 if self.resume is None else self.resume.step
        self._loader: BatchLoader | None = None
        self._doing = "the start"
        self.memory = MemoryMeasure(wanted=args.measure_memory, device=device)

    def prepare(self) -> None:
        """Reads weights and state, and checks that the checkpoints to come will fit."""
        if self._data is not None:
            self._data.check_evaluation()
        self._cpu_matmul = self._settle_products()
        self._doing = "making the weights"
        self._model = self._build_model()
        check_room(
            self._args,
            store=self._store,
            control=self._fabric.control,
            model=self._model,
            done=self.start,
        )
        self._doing = "reading the weights"
        load_weights_(
            self._model,
            self._args,
            self.resume,
            family=self._family,
            config=self._config,
            topology=self._topology,
            control=self._fabric.control,
            replicas=self._fabric.replicas,
            source=self._source,
        )
        self.profile = self._open_profile()
        self._doing = "making gradients, masters and moments"
        self._optimizer = build_optimizer(
            self._args, self._model, self._fabric.replicas, self.profile.tracer
        )
        nominal = self._settings.nominal_tokens(self._topology.num_replicas)
        self._updater = build_update_step(self._args, self._optimizer, nominal_tokens=nominal)
        load_state_(
            self._optimizer,
            self._updater,
            self.resume,
            topology=self._topology,
            control=self._fabric.control,
            indices=self._model.indices,
            keys=lambda index: module_shapes(self._family, self._config, index),
            source=self._source,
        )

    def describe(self) -> str:
        """The run in one line."""
        topology, model = self._topology, self._model
        own = sum(p.numel() for p in model.parameters())
        where = f"{self._device.type}, {self._args.precision}"
        return (
            f"{self._args.model_type}, {self._config.num_hidden_layers} layers in "
            f"{topology.num_stages} stages x {topology.num_replicas} pipelines on "
            f"{where}; {own / 1e6:,.1f} M parameters in stage {topology.stage}"
        )

    def describe_split(self) -> str:
        """How even the stages are, and how idle the schedule leaves them, in one line."""
        return self._split.describe(
            self._layers,
            schedule=self._args.pp_mode,
            num_microbatches=self._settings.num_microbatches,
            recompute=self._args.recompute,
        )

    def train(self, console: Console, stop: StopRequest, closing: ExitStack) -> str | None:
        """From the step it starts at to the last; returns a line where `stop` ended it early."""
        self.prepare()
        logger.info(self.describe())
        logger.info(self.describe_split())
        stop.phase = training(self._args.grace_seconds)
        closing.callback(self.close)
        recorder = open_run_recorder(
            self._args,
            topology=self._topology,
            layers=self._layers,
            resume=self.resume,
            console=console,
        )
        closing.callback(recorder.close)
        self._doing = "making the engine and the copy of --async-checkpoint"
        saves = self._saver(recorder)
        loop = self.loop(recorder, stop, saves)
        self._doing = "between microbatches"
        stopped = loop.run(self.start)
        stop.phase = tidying(self._args.grace_seconds)
        saves.close()
        stop.phase = CLOSING
        if stopped is None:
            self.profile.finish()
        return stopped

    @contextmanager
    def explaining_shortage(self, announce: Callable[[str], object]) -> Iterator[None]:
        """OutOfMemoryError, with what was held and which flags help, where memory runs out."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            is_known = isinstance(error, StageMemoryError)
            where = str(error) if is_known else f"stage {self._topology.stage}, {self._doing}"
            for name in ("_model", "_optimizer", "_updater"):  # to tell takes some memory too
                vars(self).pop(name, None)
            raise OutOfMemoryError(
                explain_out_of_memory(
                    where,
                    error,
                    self._args,
                    self._family,
                    self._config,
                    self._layers,
                    topology=self._topology,
                    cuda=self._device.type == "cuda",
                    announce=announce,
                )
            ) from error

    def tell_memory(self) -> None:
        """Where --measure-memory asks for it; every rank calls it."""
        self.memory.tell(
            self._args,
            self._family,
            self._config,
            self._layers,
            control=self._fabric.control,
            topology=self._topology,
        )

    def _settle_products(self) -> list[Matmul] | None:
        """By rank, what multiplies matrices on a CPU."""
        if self._device.type != "cpu":
            return None
        return choose_cpu_matmul(
            self._args.cpu_matmul,
            precision=self._args.precision,
            meta=None if self.resume is None else self.resume.meta,
            control=self._fabric.control,
        )

    def _build_model(self) -> StageModel:
        return StageModel(
            self._family,
            self._config,
            stage_modules(self._topology.stage, self._layers),
            device=self._device,
        )

    def loop(self, recorder: Recorder, stop: StopRequest, saves: Saver) -> Trainer:
        args, topology, fabric = self._args, self._topology, self._fabric
        settings, tracer = self._settings, self.profile.tracer
        engine = build_engine(
            self._model,
            StageLink(
                fabric.pipeline,
                shape=(settings.micro_rows, settings.tokens, self._config.hidden_size),
                dtype=DTYPES[args.precision],
                device=self._device,
                tracer=tracer,
            ),
            topology=topology,
            gradients=self._optimizer.flat_gradients,
            schedule=args.pp_mode,
            recompute=args.recompute,
            num_microbatches=settings.num_microbatches,
            tracer=tracer,
        )
        names = names_by_stage(self._family, self._config, self._layers)
        agreement = build_totals_reducer(names, fabric.control, topology, tracer)
        if self._data is not None:
            meta = None if self.resume is None else self.resume.meta
            self._loader = self._data.open_loader(None if meta is None else meta["data"])
        return Trainer(
            settings,
            topology=topology,
            control=fabric.control,
            engine=engine,
            feed=BatchFeed(
                self._scatter(), self._loader, num_batches=args.total_steps - self.start
            ),
            optimizer=self._optimizer,
            updater=self._updater,
            agreement=agreement,
            parameter_names=[name for of_stage in names for name in of_stage],
            evaluation=None
            if args.evaluation_data is None
            else Evaluation(
                topology,
                self._scatter(),
                fabric.control,
                engine,
                agreement,
                settings.rows,
                settings.micro_rows,
                None if self._data is None else self._data.open_evaluation,
                stop,
            ),
            recorder=recorder,
            tracer=tracer,
            stop=stop,
            saves=saves,
        )

    def close(self) -> None:
        self.profile.close()
        if self._loader is not None:
            self._loader.close()

    def _open_profile(self) -> TrainingProfile:
        return TrainingProfile(
            self._args.profiling == "tidy_profiling",
            run=self._args.checkpoint_path.resolve().name,
            control=self._fabric.control,
            topology=self._topology,
            cuda=self._device.type == "cuda",
            schedule=self._args.pp_mode,
            num_microbatches=self._settings.num_microbatches,
        )

    def _scatter(self) -> BatchScatter:
        return BatchScatter(
            self._fabric.control,
            self._topology,
            rows=self._settings.rows,
            tokens=self._settings.tokens,
            keeps_apart=self._args.pack == "document",
            device=self._device,
        )

    def _saver(self, recorder: Recorder) -> Saver:
        return Saver(
            self._args,
            store=self._store,
            topology=self._topology,
            control=self._fabric.control,
            model=self._model,
            optimizer=self._optimizer,
            updater=self._updater,
            kept=lambda: {
                "num_layers": self._layers,
                "cpu_matmul": self._cpu_matmul,
                "wandb_id": recorder.run_id,
            },
        )


def open_run_recorder(
    args: argparse.Namespace,
    *,
    topology: Topology,
    layers: Split,
    resume: ResumePoint | None,
    console: Console,
) -> Recorder:
    """Goes on with the records of the run that `resume` is of; the other ranks record nothing."""
    if topology.rank != 0:
        return SilentRecorder()
    meta = None if resume is None else resume.meta
    return open_recorder(
        args.checkpoint_path,
        console=console,
        total_steps=args.total_steps,
        resumed_step=None if resume is None else resume.step or None,
        project=args.project_name,
        config={
            "--pipeline-group-size": args.pipeline_group_size,
            "--num-layers": str(layers),
            **fixed_flags(args),
            **free_flags(args),
        },
        run_id=None if meta is None else meta.get("wandb_id"),
    )
