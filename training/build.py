"""Builders of the parts of a run: model, optimizer, engine, training loop and recorder."""

from functools import partial

from arguments.flag_table import fixed_flags, free_flags
from arguments.settings import Settings
from comm.lifecycle.stop_signals import StopRequest
from comm.run_context import RunContext
from common.tensors import DTYPES
from modules.layers.selective import MODES
from modules.stage_model import StageModel
from monitor.console import Console
from monitor.profiling.tracer import Tracer
from monitor.progress import Progress
from monitor.recorder import Recorder, open_recorder
from optimizer.build import ALGORITHMS, build_optimizer
from optimizer.loss_scaler import make_scaler
from optimizer.lr_schedule import learning_rate
from optimizer.update import UpdateStep
from pipeline_parallel.batch_scatter import BatchPrefetcher, BatchScatter
from pipeline_parallel.build import build_engine
from pipeline_parallel.engine import Engine
from pipeline_parallel.p2p import MessageSpec, StageLink, check_message_specs
from pipeline_parallel.partition.split import stage_modules
from tasks.loader import BatchLoader
from training.checkpointing import Saver
from training.evaluation import Evaluation
from training.iteration import Iteration
from training.not_finite import NotFiniteReport
from training.run_start import RunStart
from training.step_totals import TotalsReducer, names_by_stage
from training.step_work import step_work
from training.trainer import Trainer


def build_model(context: RunContext, start: RunStart) -> StageModel:
    """Builds this stage's model in fp32; the weights are not initialized."""
    indices = stage_modules(context.topology.stage, start.layers)
    return StageModel(start.family, start.config, indices, device=context.device)


def build_update_step(
    settings: Settings, context: RunContext, model: StageModel, tracer: Tracer
) -> UpdateStep:
    """Builds the optimizer with its learning-rate schedule and its loss scaler."""
    update, precision = settings.update, settings.precision
    optimizer = build_optimizer(
        model,
        ALGORITHMS[update.optimizer](),
        precision=precision.precision,
        weight_decay=update.weight_decay,
        offload=precision.use_offload,
        zero_stage=settings.parallel.zero_stage,
        dp_mode=settings.parallel.dp_mode,
        replicas=context.groups.replicas,
        tracer=tracer,
    )
    scaler = make_scaler(
        precision.precision,
        constant=precision.loss_scale,
        initial=precision.initial_loss_scale,
        minimum=precision.min_loss_scale,
        window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
    )
    schedule = partial(
        learning_rate,
        kind=update.lr_schedule,
        warmup=update.warmup_steps,
        total=update.total_updates,
        peak=update.lr,
        lowest=update.min_lr,
    )
    return UpdateStep(
        optimizer,
        scaler,
        schedule=schedule,
        nominal_tokens=update.nominal_tokens(context.topology.num_replicas),
        max_grad_norm=update.max_grad_norm,
        max_skipped=precision.max_skipped_updates,
    )


def build_trainer(
    settings: Settings,
    context: RunContext,
    start: RunStart,
    *,
    engine: Engine,
    update_step: UpdateStep,
    recorder: Recorder,
    saver: Saver,
    stop: StopRequest,
    loader: BatchLoader | None,
) -> Trainer:
    """Builds the training loop; `loader` is None on ranks other than 0."""
    names = names_by_stage(start.family, start.config, start.layers)
    totals = TotalsReducer(
        context.control,
        context.topology,
        num_parameters=[len(of_stage) for of_stage in names],
        tracer=engine.tracer,
    )
    feed = BatchPrefetcher(
        _scatter(settings, context), loader, num_batches=settings.update.total_steps - start.step
    )
    report = NotFiniteReport(
        settings.update,
        context,
        engine=engine,
        feed=feed,
        parameter_names=[name for of_stage in names for name in of_stage],
    )
    evaluation = None
    if settings.data.evaluation_data is not None:
        evaluation = Evaluation(
            settings.update,
            context,
            _scatter(settings, context),
            engine,
            totals,
            None if start.data is None else start.data.open_evaluation,
            stop,
        )
    iteration = Iteration(
        settings.update,
        context,
        engine=engine,
        feed=feed,
        update_step=update_step,
        totals=totals,
        report=report,
        stop=stop,
    )
    sizes = start.family.sizes(start.config)
    return Trainer(
        settings,
        iteration=iteration,
        work=step_work(settings, context, sizes),
        evaluation=evaluation,
        recorder=recorder,
        saver=saver,
    )


def build_stage_engine(
    settings: Settings,
    context: RunContext,
    model: StageModel,
    update_step: UpdateStep,
    tracer: Tracer,
) -> Engine:
    """Builds the engine of this stage.

    Raises:
        ValueError: the tensors that the stages would send differ in shape or type. All ranks raise
            it.
    """
    update = settings.update
    shape = update.micro_batch_size, update.seq_length, settings.model.embedding_dim
    spec = MessageSpec(shape, DTYPES[settings.precision.precision], context.device)
    check_message_specs(context.control, context.topology, spec)
    return build_engine(
        model,
        StageLink(context.groups.pipeline, spec, tracer=tracer),
        gradients=update_step.optimizer.gradients.buffer,
        schedule=settings.parallel.pp_mode,
        recompute=MODES[settings.precision.recompute],
        num_microbatches=update.num_microbatches,
        tracer=tracer,
    )


def open_run_recorder(
    settings: Settings, context: RunContext, start: RunStart, console: Console
) -> Recorder:
    """Opens the recorder, which continues the records of a resumed run; only rank 0 records."""
    if context.rank != 0:
        return Recorder()
    point = start.point
    return open_recorder(
        settings.checkpoint.checkpoint_path,
        progress=Progress(settings.update.total_steps, console),
        resumed_step=start.step or None,
        project=settings.output.project_name,
        config={
            "--pipeline-group-size": settings.parallel.pipeline_group_size,
            "--num-layers": str(start.layers),
            **fixed_flags(settings),
            **free_flags(settings),
        },
        run_id=None if point is None or point.meta is None else point.meta.wandb_id,
    )


def _scatter(settings: Settings, context: RunContext) -> BatchScatter:
    return BatchScatter(
        context.control,
        context.topology,
        rows=settings.update.batch_size,
        seq_len=settings.update.seq_length,
        keeps_apart=settings.data.pack == "document",
        device=context.device,
    )
