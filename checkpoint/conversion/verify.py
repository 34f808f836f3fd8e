"""Comparison of a converted model with its checkpoint, by the logits of one forward pass.

The modules of this project run on the weights of the stage files. The model of transformers runs on
the weights of the new safetensors files. Both run in fp32 on the same random tokens, one block
after another, so the memory never holds all weights of a model.
"""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from checkpoint.files.hf_weights import ModuleWeights, hf_names, open_model, read_module
from modules.build import make_layer
from modules.families.base import Family

LOGGER = logging.getLogger(__name__)

NUM_ROWS = 2
NUM_TOKENS = 32
SEED = 0
# The largest relative difference that rounding alone explains, divided by sqrt(hidden) and by the
# number of modules. A sum of `hidden` products has a relative error of about 2^-24 * sqrt(hidden).
# Each module has a few such sums in a row, and in the worst case the errors of the modules add up.
# Random models of 4 to 24 blocks, 32 to 1024 wide, differ by 0 (gptneox) to 1e-6 (gptj), which is
# less than a tenth of the limit. A misplaced matrix changes logits by about their own size.
TOLERANCE = 2 * 2.0**-24


@torch.no_grad()
def verify(
    folder: Path, family: Family, config: Any, modules: Sequence[ModuleWeights], dtype: torch.dtype
) -> None:
    """Compares the logits of a converted model with the logits of its checkpoint.

    Logs the largest difference between a logit of the converted model and the same logit of the
    checkpoint, divided by the largest absolute logit of the checkpoint.

    Args:
        folder: the converted model.
        family: the architecture of the model.
        config: the model's config.
        modules: the weights of the checkpoint, module by module.
        dtype: the type in which the converted model was written; `modules` are cast to it.

    Raises:
        ValueError: the difference is larger than rounding explains.
    """
    # No longer than a window: the single block of `_run_theirs` stands for blocks of both kinds.
    window = family.sizes(config).window or NUM_TOKENS
    shape = (NUM_ROWS, min(NUM_TOKENS, config.max_position_embeddings, window))
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    ours = _run_ours(family, config, modules, dtype, tokens)
    theirs = _run_theirs(folder, family, config, tokens)
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))
    allowed = TOLERANCE * math.sqrt(config.hidden_size) * len(modules)
    if not difference <= allowed:
        raise ValueError(
            f"--verify: the logits of {folder} and of the checkpoint differ by {difference:.2e} of "
            f"the largest logit, and rounding explains at most {allowed:.2e}; convert again, and "
            f"report it if the difference remains"
        )
    LOGGER.info("verified: logits differ by %.2e at most, %.2e allowed", difference, allowed)


def _run_ours(
    family: Family, config: Any, modules: Sequence[ModuleWeights], dtype: torch.dtype, x: Tensor
) -> Tensor:
    for index, weights in enumerate(modules):
        module = make_layer(family, config, index, "meta")
        state = {key: weight.float() for key, weight in read_module(weights, dtype).items()}
        module.load_state_dict(state, assign=True)
        x = module(x)
    return x


def _run_theirs(folder: Path, family: Family, config: Any, tokens: Tensor) -> Tensor:
    """Returns the logits that the model of transformers computes for `tokens` (rows, tokens).

    To save memory, the model has a single block. For each block of the converted model, the
    function copies the block's weights into the single block, and runs it.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    embedding, *blocks, head = open_model(folder, family, config)
    _fill(model, family, hf_names(family, small, 0), embedding)
    _fill(model, family, hf_names(family, small, 2), head)
    x: Tensor = model.get_input_embeddings()(tokens)
    for block in blocks[:-1]:
        _fill(model, family, hf_names(family, small, 1), block)
        x = _block_output(model, family, x)
    _fill(model, family, hf_names(family, small, 1), blocks[-1])
    logits: Tensor = model(inputs_embeds=x, use_cache=False).logits
    return logits


def _fill(
    model: nn.Module, family: Family, names: Mapping[str, str], weights: ModuleWeights
) -> None:
    """Copies `weights` to the parameters of `model`.

    The keys of `weights` are shard keys: the names of the weights in a layer shard. `names` maps a
    shard key to a Hugging Face key. Most parameters of `model` have the Hugging Face key as their
    name. For the others, `family.hf_aliases` maps the parameter's name to the Hugging Face key.
    """
    parameters = dict(model.named_parameters())
    attributes = {name: alias for alias, name in family.hf_aliases.items()}
    for key, weight in read_module(weights).items():
        name = names[key] if names[key] in parameters else attributes[names[key]]
        parameters[name].copy_(weight)


def _block_output(model: Any, family: Family, x: Tensor) -> Tensor:
    """Returns the output of the model's single block for `x`; both are (rows, tokens, hidden)."""
    outputs: list[Any] = []
    prefix = next(iter(family.hf_block.values())).partition(".{layer}")[0]
    block = model.get_submodule(f"{prefix}.0")
    hook = block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model.base_model(inputs_embeds=x, use_cache=False)
    hook.remove()
    output: Tensor = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    return output
