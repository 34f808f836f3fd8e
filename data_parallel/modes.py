"""The dp modes: the ways in which replicas exchange gradients, one for each value of --dp-mode.

The module imports no torch until `load_dp_mode` is called.

A dp mode is a class in a file of this package, and one line in `DP_MODES`. The keys of `DP_MODES`
are the choices of the flag. The class has these methods:

    Mode(parameters, partition, replicas, tracer)
    bucket_ready(bucket)    starts the exchange of a bucket whose gradients are complete
    finish()                waits until the gradients of all buckets are exchanged
    after_update()          runs after each update of the weights
    state_dict()            returns the state that the next update needs from earlier updates
    load_state_dict(state)  restores this state

`data_parallel.allreduce.AllReduce` is an example. Buckets become ready in the same order on all
replicas, so a dp mode can start collective operations in `bucket_ready`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_parallel.allreduce import AllReduce

DP_MODES = {"allreduce": "data_parallel.allreduce:AllReduce"}


def load_dp_mode(name: str) -> "type[AllReduce]":
    """Returns the class of the dp mode `name`, a key of `DP_MODES`; imports torch."""
    module, mode = DP_MODES[name].split(":")
    loaded: type[AllReduce] = getattr(import_module(module), mode)
    return loaded
