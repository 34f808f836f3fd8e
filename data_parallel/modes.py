"""The ways in which replicas exchange gradients, by the value of --dp-mode. Needs no torch.

A mode is a class in a file of this package, and one line in `DP_MODES`, whose keys are the choices
of the flag:

    Mode(parameters, partition, replicas, tracer)
    bucket_ready(bucket)    starts the exchange of a bucket whose gradients are complete
    finish()                waits until the gradients of all buckets are exchanged
    after_update()          runs after each update of the weights
    state_dict()            returns what the next update needs to know from the ones before
    load_state_dict(state)  restores it

`data_parallel.allreduce.AllReduce` is an example. Buckets become ready in the same order on all
replicas, so that a mode may start collective operations at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_parallel.allreduce import AllReduce

DP_MODES = {"allreduce": "data_parallel.allreduce:AllReduce"}


def load_dp_mode(name: str) -> "type[AllReduce]":
    """Returns the class of a mode of `DP_MODES`; imports torch."""
    module, mode = DP_MODES[name].split(":")
    loaded: type[AllReduce] = getattr(import_module(module), mode)
    return loaded
