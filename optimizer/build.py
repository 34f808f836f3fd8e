"""What a run updates its weights with: algorithm, precision, schedule, loss scale."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from comm.communicator import Communicator
from common.tensors import DTYPES
from modules.stage_model import StageModel
from monitor.profiling.tracer import Tracer
from optimizer.adam import Adam
from optimizer.adam_8bit import Adam8bit
from optimizer.loss_scaler import make_scaler
from optimizer.lr_schedule import learning_rate
from optimizer.mixed_precision import Algorithm, MixedPrecisionOptimizer
from optimizer.update import UpdateStep

ALGORITHMS: dict[str, type[Algorithm]] = {"adam": Adam, "8bit-adam": Adam8bit}
MOMENT_BYTES = {"adam": 8.0, "8bit-adam": 2.1}  # of one parameter


def build_optimizer(
    args: argparse.Namespace,
    model: StageModel,
    replicas: Communicator,
    tracer: Tracer,
    algorithm: Algorithm | None = None,
) -> MixedPrecisionOptimizer:
    """Takes the model in fp32, and leaves its weights in the compute type.

    `algorithm` is that of the flags where it is None.
    """
    return MixedPrecisionOptimizer(
        dict(model.named_parameters()),
        algorithm or ALGORITHMS[args.optimizer](),
        dtype=DTYPES[args.precision],
        weight_decay=args.weight_decay,
        offload=args.use_offload,
        sharded=args.zero_stage == 1,
        replicas=replicas,
        tracer=tracer,
    )


def build_update_step(
    args: argparse.Namespace, optimizer: MixedPrecisionOptimizer, *, nominal_tokens: int
) -> UpdateStep:
    """The updates of `optimizer`, over `nominal_tokens` where all tokens are trained."""
    schedule = partial(
        learning_rate,
        kind=args.lr_schedule,
        warmup=args.warmup_steps,
        total=args.total_steps // args.gradient_accumulate_step,
        peak=args.lr,
        lowest=args.min_lr,
    )
    scaler = make_scaler(
        args.precision,
        constant=args.loss_scale,
        initial=args.initial_loss_scale,
        minimum=args.min_loss_scale,
        window=args.loss_scale_window,
        hysteresis=args.hysteresis,
    )
    return UpdateStep(
        optimizer,
        scaler,
        schedule=schedule,
        nominal_tokens=nominal_tokens,
        max_grad_norm=args.max_grad_norm,
        max_skipped=args.max_skipped_updates,
    )


def checkpoint_bytes(args: argparse.Namespace, num_parameters: int) -> tuple[int, int]:
    """What a checkpoint of so many parameters takes: weights; masters and moments."""
    dtype = DTYPES[args.precision]
    masters = 0 if dtype == torch.float32 else 4
    state = num_parameters * (masters + MOMENT_BYTES[args.optimizer])
    return num_parameters * dtype.itemsize, int(state)
