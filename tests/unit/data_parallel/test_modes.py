"""Tests that every mode of --dp-mode has the methods that data_parallel/ calls."""

import pytest
import torch
from torch import nn

from data_parallel.modes import DP_MODES, load_dp_mode
from data_parallel.replica_gradients import ReplicaGradients
from data_parallel.zero_partition import ZeroPartition
from tests.support.pipeline_doubles import NotedCommunicator

METHODS = ("bucket_ready", "finish", "after_update", "state_dict", "load_state_dict")


@pytest.mark.parametrize("name", DP_MODES)
def test_a_mode_has_its_methods_and_restores_its_own_state(name: str) -> None:
    mode = load_dp_mode(name)
    assert all(callable(getattr(mode, method)) for method in METHODS)
    model, replicas = nn.Linear(4, 3), NotedCommunicator(0, 2)
    parameters = dict(model.named_parameters())
    partition = ZeroPartition(parameters, replicas, sharded=False)
    gradients = ReplicaGradients(parameters, partition, replicas, mode=name)
    gradients.begin_update(1)
    model(torch.ones(2, 4)).sum().backward()
    gradients.finish_exchange()
    gradients.after_update()
    gradients.exchange.load_state_dict(gradients.exchange.state_dict())
