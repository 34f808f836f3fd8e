"""Stages of a tiny model; a test can run one stage without the stages before and after it."""

from functools import cache
from typing import Any

import torch

from comm.communicator import Communicator
from modules.build import initialise_
from modules.layers.selective import Recompute
from modules.registry import MODELS
from modules.stage_model import StageModel
from pipeline_parallel.engine import Engine
from pipeline_parallel.p2p import MessageSpec, StageLink
from pipeline_parallel.partition.split import stage_modules
from pipeline_parallel.schedule.schedules import Schedule, splits_backward
from pipeline_parallel.stage import Stage
from tests.support.gradients import gradients_of
from tests.support.models import make_hf

ROWS, TOKENS, HIDDEN, VOCABULARY = 2, 16, 32, 97
CPU = torch.device("cpu")


@cache
def config(num_layers: int) -> Any:
    return make_hf("gptneox", num_hidden_layers=num_layers).config


def make_model(stage_index: int, num_stages: int) -> StageModel:
    """Builds stage `stage_index` of a model that has two layers on each of `num_stages` stages."""
    family, of_all = MODELS["gptneox"].load(), config(2 * num_stages)
    indices = stage_modules(stage_index, [2] * num_stages)
    model = StageModel(family, of_all, indices, device=CPU)
    for index, module in zip(indices, model, strict=True):
        initialise_(module, std=0.1, seed=1, index=index)
    return model


def make_stage(
    pipeline: Communicator,
    *,
    schedule: Schedule,
    recompute: Recompute,
    model: StageModel | None = None,
) -> Stage:
    model = make_model(pipeline.rank, pipeline.size) if model is None else model
    splits = splits_backward(schedule, pipeline.rank, pipeline.size)
    return Stage(model, recompute=recompute, gradients=gradients_of(model).buffer, splits=splits)


def make_engine(
    schedule: Schedule,
    pipeline: Communicator,
    *,
    num_microbatches: int,
    recompute: Recompute = "none",
    stage: Stage | None = None,
) -> Engine:
    if stage is None:
        stage = make_stage(pipeline, schedule=schedule, recompute=recompute)
    spec = MessageSpec((ROWS, TOKENS, HIDDEN), torch.float32, CPU)
    link = StageLink(pipeline, spec)
    return Engine(stage, link, schedule=schedule, num_microbatches=num_microbatches)
