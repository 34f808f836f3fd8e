"""Checks of rules that connect several flags. The module imports no torch.

A failed check raises ValueError. Its text is one line that names the flags, the values that the
user gave, and the values that are allowed.
"""

from arguments.settings import (
    NetworkSettings,
    ParallelSettings,
    PrecisionSettings,
    Settings,
    UpdateSettings,
)
from comm.rendezvous.dist_url import parse_dist_url
from pipeline_parallel.partition.split import Split, check_length

MIN_DIST_TIMEOUT = 5.0  # seconds; several times the EXCHANGE_SECONDS of comm/collective_io.py


def check_settings(settings: Settings) -> None:
    """Raises ValueError if the flags are invalid or contradict each other."""
    _check_shape(settings.parallel)
    if isinstance(settings.model.num_layers, Split):
        check_length(settings.model.num_layers, settings.parallel.pipeline_group_size)
    _check_network(settings.network)
    _check_update(settings.update)
    _check_precision(settings.precision)
    _check_rates(settings.update)


def warnings_about(settings: Settings) -> list[str]:
    """Returns warnings about flags that have no effect or are probably a mistake."""
    data, output, precision = settings.data, settings.output, settings.precision
    warnings = []
    if output.train_warmup_steps is not None:
        warnings.append("--train-warmup-steps does nothing; --warmup-steps sets the warm-up")
    if data.evaluation_steps and data.evaluation_data is None:
        warnings.append(
            f"--evaluation-steps {data.evaluation_steps} does nothing without --evaluation-data"
        )
    if output.device_memory is not None and not output.plan:
        warnings.append("--device-memory does nothing without --plan")
    if output.link is not None and not output.plan:
        warnings.append("--link does nothing without --plan; --check-cluster measures links")
    if precision.scales_dynamically and precision.max_skipped_updates <= precision.hysteresis:
        warnings.append(
            f"--max-skipped-updates {precision.max_skipped_updates} ends the run before an update "
            f"uses a lower loss scale, which needs --hysteresis {precision.hysteresis} overflows"
        )
    return warnings


def _check_shape(parallel: ParallelSettings) -> None:
    stages, replicas = parallel.pipeline_group_size, parallel.data_group_size
    if parallel.world_size != stages * replicas:
        raise ValueError(
            f"--world-size {parallel.world_size} is not --pipeline-group-size {stages} times "
            f"--data-group-size {replicas}"
        )
    if parallel.rank >= parallel.world_size:
        raise ValueError(
            f"--rank {parallel.rank}: expected less than --world-size {parallel.world_size}"
        )


def _check_network(network: NetworkSettings) -> None:
    parse_dist_url(network.dist_url)
    if network.dist_timeout < MIN_DIST_TIMEOUT:
        raise ValueError(
            f"--dist-timeout {network.dist_timeout:g}: expected at least {MIN_DIST_TIMEOUT:g} "
            "seconds, because ranks that save report to each other every second"
        )


def _check_update(update: UpdateSettings) -> None:
    for flag, part, of_flag, total in (
        ("--micro-batch-size", update.micro_batch_size, "--batch-size", update.batch_size),
        (
            "--gradient-accumulate-step",
            update.gradient_accumulate_step,
            "--total-steps",
            update.total_steps,
        ),
    ):
        if total % part:
            raise ValueError(f"{flag} {part} does not divide {of_flag} {total}")
    if update.warmup_steps > update.total_updates:
        raise ValueError(
            f"--warmup-steps {update.warmup_steps}: the run has only {update.total_updates} updates"
        )


def _check_precision(precision: PrecisionSettings) -> None:
    if precision.fp16 and precision.bf16:
        raise ValueError("--fp16 and --bf16 are both given: expected at most one of them")
    is_lower = precision.min_loss_scale <= precision.initial_loss_scale
    if precision.scales_dynamically and not is_lower:
        raise ValueError(
            f"--min-loss-scale {precision.min_loss_scale:g}: expected at most "
            f"--initial-loss-scale {precision.initial_loss_scale:g}"
        )


def _check_rates(update: UpdateSettings) -> None:
    if update.min_lr > update.lr:
        raise ValueError(f"--min-lr {update.min_lr:g}: expected at most --lr {update.lr:g}")
    if update.min_lr and update.lr_schedule == "constant":
        raise ValueError(
            f"--min-lr {update.min_lr:g}: expected 0 with --lr-schedule constant, which never "
            "lowers the rate"
        )
