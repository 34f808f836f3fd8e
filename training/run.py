"""The training of one process, from the start or a checkpoint to the last step."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from arguments.settings import Settings
from checkpoint.store import ResumePoint
from comm.communicator import CurrentOperation
from comm.lifecycle.stop_signals import CLOSING, StopRequest, cleanup, training
from comm.run_context import RunContext
from modules.stage_model import StageModel
from monitor.console import Console
from monitor.out_of_memory import is_out_of_memory
from pipeline_parallel.engine import StageMemoryError
from planning.memory.auto_recompute import choose_recompute
from planning.memory.measure import MemoryMeasure
from planning.memory.out_of_memory import explain_out_of_memory
from training.build import (
    build_model,
    build_stage_engine,
    build_trainer,
    build_update_step,
    open_run_recorder,
)
from training.checkpointing import Saver, check_room
from training.cpu_matmul import choose_cpu_matmul
from training.initial_state import load_state_, load_weights_
from training.iteration import TrainingStoppedError
from training.profiling import TrainingProfile
from training.run_start import RunStart, open_run
from training.warm_up import warm_up

logger = logging.getLogger(__name__)


class OutOfMemoryError(TrainingStoppedError):
    """An out-of-memory error whose text names the operation and a remedy."""


def train(
    settings: Settings,
    context: RunContext,
    *,
    console: Console,
    stop: StopRequest,
    closing: ExitStack,
) -> str | None:
    """Runs the training that the settings describe; every process calls it.

    Args:
        closing: a stack for cleanup functions, which run after success and after failure.

    Returns:
        A line that says why `stop` ended the run early; None if the run is complete.

    Raises:
        ValueError: the user made a mistake.
        TrainingStoppedError: training cannot continue.
    """
    start = open_run(settings, context)
    if start.step >= settings.update.total_steps:
        _check_success(start.point)
        logger.info(
            "%d of %d steps are done: nothing to do", start.step, settings.update.total_steps
        )
        return None
    flag = settings.precision.recompute
    settings = choose_recompute(settings, start.planned, context)
    operation = CurrentOperation()
    measure = MemoryMeasure(wanted=settings.output.measure_memory, device=context.device)
    with _explaining_memory(settings, context, start, operation), measure.measuring():
        stopped = _train(settings, flag, context, start, operation, console, stop, closing)
    measure.log(settings, start.planned, context)
    return stopped


def _train(
    settings: Settings,
    recompute_flag: str,
    context: RunContext,
    start: RunStart,
    operation: CurrentOperation,
    console: Console,
    stop: StopRequest,
    closing: ExitStack,
) -> str | None:
    """Builds the parts of the run, and trains.

    Parts that can find a mistake of the user are built first. `operation.text` is set to the name
    of the current operation, because the text of an out-of-memory error contains this name.
    Checkpoints save `recompute_flag`, the value that the user gave, not the mode that auto chose.
    """
    if start.data is not None:
        start.data.check_evaluation()
    matmul = None
    if not context.is_cuda:
        kept = None if start.point is None or start.point.meta is None else start.point.meta
        matmul = choose_cpu_matmul(
            settings.precision.cpu_matmul,
            precision=settings.precision.precision,
            saved=None if kept is None else kept.cpu_matmul,
            control=context.control,
        )
    operation.text = "making the weights"
    model = build_model(context, start)
    check_room(settings, start.store, context.control, model=model, done=start.step)
    operation.text = "reading the weights"
    load_weights_(model, settings, context, start)
    profile = TrainingProfile(settings, context)
    operation.text = "making gradients, masters and moments"
    update_step = build_update_step(settings, context, model, profile.tracer)
    load_state_(update_step, context, start, indices=model.indices)
    _log_description(settings, context, start, model)
    stop.phase = training(settings.checkpoint.grace_seconds)
    loader_closing = closing.enter_context(ExitStack())  # closed last: it can wait for a batch
    closing.callback(profile.close)
    recorder = open_run_recorder(settings, context, start, console)
    closing.callback(recorder.close)
    operation.text = "making the engine and the copy of --async-checkpoint"
    saver = Saver(
        settings.changed(recompute=recompute_flag),
        context,
        store=start.store,
        model=model,
        update_step=update_step,
        extra_meta=lambda: {
            "num_layers": start.layers,
            "cpu_matmul": matmul,
            "wandb_id": recorder.run_id,
        },
    )
    engine = build_stage_engine(settings, context, model, update_step, profile.tracer)
    if context.is_cuda:
        operation.text = "warming up"
        warm_up(settings, context, engine, update_step.optimizer.gradients.buffer)
    loader = None
    if start.data is not None:
        meta = None if start.point is None else start.point.meta
        loader = start.data.open_loader(None if meta is None else dict(meta.data))
        loader_closing.callback(loader.close)
    trainer = build_trainer(
        settings,
        context,
        start,
        engine=engine,
        update_step=update_step,
        recorder=recorder,
        saver=saver,
        stop=stop,
        loader=loader,
    )
    operation.text = "between microbatches"
    try:
        stopped = trainer.run(start.step)
    except TrainingStoppedError as error:
        trainer.finish_after(error)
    stop.phase = cleanup(settings.checkpoint.grace_seconds)
    saver.close()
    stop.phase = CLOSING
    if stopped is None:
        profile.finish()
    return stopped


def _log_description(
    settings: Settings, context: RunContext, start: RunStart, model: StageModel
) -> None:
    topology, precision = context.topology, settings.precision
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        f"{settings.model.model_type}, {start.config.num_hidden_layers} layers in "
        f"{topology.num_stages} stages x {topology.num_replicas} pipelines on "
        f"{context.device.type}, {precision.precision}; {parameters / 1e6:,.1f} M parameters in "
        f"stage {topology.stage}"
    )
    split = start.split.describe(
        start.layers,
        schedule=settings.parallel.pp_mode,
        num_microbatches=settings.update.num_microbatches,
        recompute=precision.recompute == "true",
    )
    logger.info(split)


@contextmanager
def _explaining_memory(
    settings: Settings, context: RunContext, start: RunStart, operation: CurrentOperation
) -> Iterator[None]:
    """Turns an out-of-memory error into an OutOfMemoryError whose text names a remedy."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        place = f"stage {context.topology.stage}, {operation.text}"
        if isinstance(error, StageMemoryError):
            place = str(error)
        explained = explain_out_of_memory(
            place, error, settings, start.planned, rank=context.rank, cuda=context.is_cuda
        )
        raise OutOfMemoryError(explained) from error


def _check_success(point: ResumePoint | None) -> None:
    """Raises TrainingStoppedError if the checkpoint was saved when the run gave up."""
    if point is not None and point.meta is not None and point.meta.gave_up:
        raise TrainingStoppedError(
            f"the run gave up at its last step, {point.step}: too many updates in a row were "
            "skipped; a larger --total-steps continues the run"
        )
