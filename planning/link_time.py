"""The time of an iteration over links of a given speed, for --plan --link."""

import math
from collections.abc import Iterator

import torch

from arguments.settings import Settings
from comm.topology import Topology
from common.text import format_bytes, format_seconds
from modules.model_sizes import ModelSizes
from planning.cluster.estimate import Estimate, make_run_shape
from planning.cluster.link_probe import LinkSpeed, links
from planning.cluster.matmul_rate import block_rate

_MATMUL_SECONDS = 0.3


def time_over_links(settings: Settings, sizes: ModelSizes, *, is_cuda: bool) -> Iterator[str]:
    """Yields lines with the least seconds of an iteration and of the replicas' exchange.

    All links have the speed of --link, and all ranks have devices like this machine's: the CPU, or
    with `is_cuda` its GPU. Without a GPU here, the estimate counts messages only.
    """
    link, parallel = settings.output.link, settings.parallel
    shape = make_run_shape(settings, sizes)
    assert link is not None
    assert shape is not None
    topology = Topology(0, parallel.pipeline_group_size, parallel.data_group_size)
    rate = _rate(settings, sizes, is_cuda=is_cuda)
    seconds = link.latency + shape.message / link.bytes_per_second
    speed = LinkSpeed(link.latency, shape.message, seconds)
    estimate = Estimate(
        shape, topology, [rate] * topology.world_size, dict.fromkeys(links(topology), speed)
    )
    of_device = "for messages alone (this machine has no GPU whose speed could be measured)"
    if math.isfinite(rate):
        of_device = (
            f"for matmuls and messages, with free links "
            f"{format_seconds(estimate.iteration_with_free_links)} (devices as fast as this "
            f"machine's: {2e-9 * rate:.4g} GFLOP/s)"
        )
    described = f"{format_bytes(round(link.bytes_per_second))}/s"
    if link.latency:
        described += f" with a latency of {format_seconds(link.latency)}"
    message = f"{format_bytes(shape.message)} takes {format_seconds(seconds)}"
    yield (
        f"over links of {described}, a message of {message}; an iteration takes at least "
        f"{format_seconds(estimate.iteration)} {of_device}"
    )
    exchanges = [estimate.exchange(stage) for stage in range(topology.num_stages)]
    slowest = max((exchange[0] for exchange in exchanges if exchange is not None), default=None)
    if slowest is not None:
        yield (
            f"in addition, each update exchanges gradients between replicas in "
            f"{format_seconds(slowest)}"
        )


def _rate(settings: Settings, sizes: ModelSizes, *, is_cuda: bool) -> float:
    """Returns the multiply-adds per second of this machine's device; infinity if it has no GPU."""
    if is_cuda and not torch.cuda.is_available():
        return math.inf
    device = torch.device("cuda" if is_cuda else "cpu")
    return block_rate(settings, sizes, device, budget=_MATMUL_SECONDS)
