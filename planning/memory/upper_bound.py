"""An upper bound of the memory of one process, computed from sizes without a dry run.

A dry run takes seconds, because it imports large modules. Many runs need far less memory than there
is, and this bound shows it at once. It holds for --recompute false, and so for every mode.
"""

from torch import nn

from arguments.settings import Settings
from comm.topology import Topology
from modules.build import make_layer
from pipeline_parallel.schedule.schedules import SCHEDULES, splits_backward
from pipeline_parallel.schedule.validate import peak_in_flight
from planning.memory.dry_run import PlannedModel

FIXED = 2**20  # bytes: small tables and buffers


def upper_bound(settings: Settings, model: PlannedModel, rank: int) -> int:
    """Returns bytes that the peak of the process with this global rank does not exceed.

    All numbers count as fp32, all state is on the device, and temporary tensors are estimated
    generously. (tests/distributed/test_plan_memory.py compares the bound with dry runs.)
    """
    parallel = settings.parallel
    topology = Topology(rank, parallel.pipeline_group_size, parallel.data_group_size)
    last = model.config.num_hidden_layers + 1
    embedding, block, head = (
        make_layer(model.family, model.config, index, "meta") for index in (0, 1, last)
    )
    parts = [block] * model.layers[topology.stage]
    parts += [embedding] * topology.is_first + [head] * topology.is_last
    state = sum(map(_num_parameters, parts)) * _state_bytes(settings)
    largest = 4 * max(p.numel() for part in parts for p in part.parameters())
    return state + 8 * largest + _activation_bytes(settings, model, topology) + FIXED


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _state_bytes(settings: Settings) -> int:
    """Returns bytes per parameter: weights, gradients, masters, moments, and their copies."""
    per_parameter = 4 + 4 + 4 + 8
    if settings.checkpoint.async_checkpoint:
        per_parameter += 16
    if settings.parallel.data_group_size > 1:  # sums of replicas; states of other replicas
        per_parameter += 20
    return per_parameter


def _activation_bytes(settings: Settings, model: PlannedModel, topology: Topology) -> int:
    """Returns bytes of activations, messages, logits and temporary tensors.

    Per token, a layer of GPT-NeoX saves 7 x hidden + 2 x inner numbers, those of dropout masks not
    included; an activation function of several operators saves some more. On a CPU, attention with
    dropout saves some matrices of scores.
    """
    parallel, update, stage = settings.parallel, settings.update, topology.stage
    sizes, schedule = model.family.sizes(model.config), SCHEDULES[parallel.pp_mode]
    heads: int = model.config.num_attention_heads
    num_stages, seq_len = topology.num_stages, update.seq_length
    held = peak_in_flight(schedule, stage, num_stages, update.num_microbatches)
    width = max(sizes.hidden, sizes.heads * sizes.head_size)
    of_layer = 16 * width + 10 * sizes.inner + 8 * heads * seq_len
    layers = held * model.layers[stage] + 2  # backward has temporary tensors
    num_logits = 4 + held * splits_backward(schedule, stage, num_stages)
    per_token = layers * of_layer + 2 * (held + 8) * sizes.hidden
    per_token += num_logits * sizes.vocabulary * topology.is_last
    token_ids = 8 * 6 * update.batch_size * seq_len
    return 4 * update.micro_batch_size * seq_len * per_token + token_ids
