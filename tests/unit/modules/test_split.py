"""Tests --num-layers: forms of its value, the modules of each stage, and the balanced split.

The balanced split must be the best of all splits. It is calculated from the work of each module;
this work must match the sizes of the matrices in the real module.
"""

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from modules.build import make_layer
from modules.model_sizes import ModuleWork
from modules.registry import MODELS
from pipeline_parallel.partition.balance import balanced_split, choose_split, stage_work
from pipeline_parallel.partition.split import Split, fit_split, parse_layers, stage_modules
from tests.support.models import make_hf

# --num-layers, stages, layers of the model, layers of each stage
SPLITS: list[tuple[str, int, int, tuple[int, ...]]] = [
    ("44", 1, 44, (44,)),
    ("100", 1, 44, (44,)),
    ("4", 2, 8, (4, 4)),
    ("4", 2, 7, (4, 3)),
    ("6", 8, 44, (6, 6, 6, 6, 6, 6, 6, 2)),
    ("5,3", 2, 8, (5, 3)),
    ("1,05,2", 3, 8, (1, 5, 2)),
]


@pytest.mark.parametrize(("text", "stages", "layers", "expected"), SPLITS)
def test_a_number_or_a_list_is_a_split(
    text: str, stages: int, layers: int, expected: tuple[int, ...]
) -> None:
    split = fit_split(parse_layers(text), num_stages=stages, model_layers=layers)
    assert split == expected
    assert isinstance(split, Split)
    assert str(split) == ",".join(map(str, expected))


def test_a_stage_has_its_blocks_and_the_ends_their_modules() -> None:
    """Modules 1-4 are blocks; stage 0 also has the embedding (0), the last stage the head (5)."""
    assert [stage_modules(i, (1, 2, 1)) for i in range(3)] == [range(2), range(2, 4), range(4, 6)]
    assert stage_modules(0, (4,)) == range(6)


def all_splits(stages: int, layers: int) -> list[tuple[int, ...]]:
    cuts = ((0, *inner, layers) for inner in combinations(range(1, layers), stages - 1))
    return [tuple(b - a for a, b in pairwise(cut)) for cut in cuts]


def slowest_first(split: tuple[int, ...], block: int, head: int) -> list[int]:
    work = [count * block for count in split]
    work[-1] += head
    return sorted(work, reverse=True)


@pytest.mark.parametrize(
    ("block", "head"), [(3, 0), (3, 1), (3, 3), (3, 4), (3, 6), (2, 9), (1, 50)]
)
def test_auto_is_the_best_of_all_splits(block: int, head: int) -> None:
    work = ModuleWork(block, head)
    for layers in range(1, 11):
        for stages in range(1, layers + 1):
            every = all_splits(stages, layers)
            best = min(every, key=lambda split: (slowest_first(split, block, head), split))
            found = balanced_split(work, num_stages=stages, model_layers=layers)
            assert found == best, (stages, layers)
            assert max(stage_work(found, work)) == slowest_first(best, block, head)[0]


@pytest.mark.parametrize("speeds", [(1, 1, 1), (3, 1, 2), (1, 10, 1), (0.5, 4, 1e3)])
def test_a_slower_device_gets_fewer_blocks(speeds: tuple[float, ...]) -> None:
    """At these device speeds, no other split makes the slowest stage faster."""
    for layers in range(3, 12):
        found = balanced_split(ModuleWork(2, 3), num_stages=3, model_layers=layers, speeds=speeds)

        def seconds(split: tuple[int, ...]) -> float:
            work = stage_work(Split(split), ModuleWork(2, 3))
            return max(one / speed for one, speed in zip(work, speeds, strict=True))

        assert seconds(found) == min(map(seconds, all_splits(3, layers)))


def neox(hidden: int, layers: int, vocabulary: int) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
    return {**sizes, "num_hidden_layers": layers, "vocab_size": vocabulary}


NEOX, NEOX_20B = neox(512, 8, 8192), neox(6144, 44, 50432)
GPTJ_6B = {"n_embd": 4096, "n_layer": 28, "n_inner": None, "vocab_size": 50400}
# family, config, tokens, stages, layers of each stage
BALANCED: list[tuple[str, dict[str, Any], int, int, tuple[int, ...]]] = [
    ("gptneox", NEOX, 256, 1, (8,)),
    ("gptneox", NEOX, 256, 2, (5, 3)),
    ("gptneox", NEOX, 256, 4, (2, 2, 3, 1)),
    ("gptneox", NEOX, 256, 8, (1, 1, 1, 1, 1, 1, 1, 1)),
    ("gptneox", NEOX_20B, 2048, 8, (5, 5, 5, 6, 6, 6, 6, 5)),
    ("gptj", GPTJ_6B, 2048, 2, (14, 14)),
    ("gptj", GPTJ_6B, 2048, 4, (7, 7, 7, 7)),
]


def hf_config(family: str, values: dict[str, Any]) -> Any:
    return MODELS[family].load().config_class(**values)


@pytest.mark.parametrize(("family", "config", "tokens", "stages", "expected"), BALANCED)
def test_auto_of_known_models(
    family: str, config: dict[str, Any], tokens: int, stages: int, expected: tuple[int, ...]
) -> None:
    sizes = MODELS[family].load().sizes(hf_config(family, config))
    chosen = choose_split("auto", sizes.work(tokens), num_stages=stages, model_layers=sizes.layers)
    assert chosen == expected


def test_the_work_of_a_known_model() -> None:
    """The work of a block and of the head equals numbers calculated by hand.

    Block: 4 x 512^2 + 2 x 512 x 2048 + 2 x 512 x 128.5; a token attends to 128.5 keys on average.
    Head: 512 x 8192.
    """
    work = MODELS["gptneox"].load().sizes(hf_config("gptneox", NEOX)).work(256)
    assert work == ModuleWork(block=1048576 + 2097152 + 131584, head=4194304)
    assert stage_work(Split((5, 3)), work) == (5 * 3277312, 3 * 3277312 + 4194304)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gptneox", {}),
        ("gptneox", {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 100}),
        ("gptj", {}),
        ("gptj", {"n_inner": 50, "vocab_size": 131}),
        ("llama", {}),
        ("llama", {"head_dim": 12, "num_key_value_heads": 1}),
    ],
)
def test_work_is_that_of_the_modules_matrices(name: str, changes: dict[str, Any]) -> None:
    """A module's work per token is its number of matrix elements.

    A block's work has, in addition, 2 x width of all heads for each key that a token attends to.
    """
    family, config, tokens = MODELS[name].load(), make_hf(name, **changes).config, 9
    layers = [make_layer(family, config, i, "meta") for i in range(config.num_hidden_layers + 2)]
    _, block, *_, head = (sum(p.numel() for p in x.parameters() if p.dim() > 1) for x in layers)
    keys = sum(position + 1 for position in range(tokens))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * size
    assert (2 * width * keys) % tokens == 0
    work = family.sizes(config).work(tokens)
    assert work.block == block + 2 * width * keys // tokens
    assert work.head == head


def test_a_query_with_a_window_has_less_work() -> None:
    """In 9 tokens, a query sees 45 keys in all without a window, and 42 with a window of 7.

    Two of the three blocks have the window. The work of a block is the mean.
    """
    window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    sizes = MODELS["qwen3"].load().sizes(make_hf("qwen3", **window).config)
    block = 32 * (2 * 32 + 2 * 16 + 3 * 48)
    assert sizes.work(9).block == block + 2 * 32 * (45 + 42 + 42) // (9 * 3)
    assert sizes.work(7) == sizes._replace(window=0, window_layers=0).work(7)


@pytest.mark.parametrize(("family", "key"), [("gptneox", "intermediate_size"), ("gptj", "n_inner")])
def test_a_config_with_a_size_of_zero_is_refused(family: str, key: str, tmp_path: Path) -> None:
    hf_config(family, {key: 0}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"config.json: {key} is 0, expected an integer above 0"):
        MODELS[family].load().load_config(tmp_path)
