"""Construction of a model's modules, one by one, uninitialised or with seeded random weights.

A model of L blocks has L + 2 modules: 0 the embedding, 1..L the blocks, L + 1 the head.
"""

from typing import Any

import torch
from torch import nn

from common.seeds import derive_seed
from modules.families.base import Family
from modules.layers.norm import RMSNorm


def make_layer(family: Family, config: Any, index: int, device: torch.device | str) -> nn.Module:
    """Returns module `index` of the model (0 is the embedding), uninitialised, in fp32 on `device`.

    On the device "meta" the module uses no memory, because it has only names and shapes.
    """
    with torch.device("meta"):
        if index == 0:
            module = family.make_embedding(config)
        elif index <= config.num_hidden_layers:
            module = family.make_block(config, index - 1)
        else:
            module = family.make_head(config)
    module = module.to(torch.float32)
    if torch.device(device).type != "meta":
        _allocate_(module, device)
    return module


def _allocate_(module: nn.Module, device: torch.device | str) -> None:
    """Replaces a module's "meta" parameters by uninitialised parameters on `device`.

    `Module.to_empty` does the same, but makes torch import sympy, which takes 0.3 s.
    """
    assert not list(module.buffers())
    for part in module.modules():
        for name, on_meta in list(part.named_parameters(recurse=False)):
            memory = torch.empty(on_meta.shape, dtype=on_meta.dtype, device=device)
            setattr(part, name, nn.Parameter(memory, requires_grad=on_meta.requires_grad))


def parameter_names(family: Family, config: Any, index: int) -> list[str]:
    """Returns readable names of the parameters of module `index`, such as `layer 3, mlp.bias`."""
    last = config.num_hidden_layers + 1
    title = {0: "embedding", last: "head"}.get(index, f"layer {index - 1}")
    module = make_layer(family, config, index, "meta")
    return [f"{title}, {name}" for name, _ in module.named_parameters()]


@torch.no_grad()
def initialise_(module: nn.Module, *, std: float, seed: int, index: int) -> None:
    """Fills a module with random weights, which depend only on (seed, index).

    As in transformers, matrices are normal with standard deviation `std`, biases are 0, and norms
    have weight 1 and bias 0.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights", index))
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.fill_(1.0)
            part.bias.zero_()
        elif isinstance(part, RMSNorm):
            part.weight.fill_(1.0)
        elif isinstance(part, (nn.Linear, nn.Embedding)):
            values = torch.empty(part.weight.shape).normal_(0.0, std, generator=generator)
            part.weight.copy_(values)
            if isinstance(part, nn.Linear) and part.bias is not None:
                part.bias.zero_()
