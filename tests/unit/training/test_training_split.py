"""Tests the log line that names the split of the layers and the expected bubble."""

import pytest

from modules.model_sizes import ModelSizes
from pipeline_parallel.partition.split import Split
from pipeline_parallel.partition.stage_split import StageSplit

# Per token, a block has 32 + 2 x 8 = 48 multiply-adds, and the head 2 x 24 = 48, too.
SIZES = ModelSizes(
    layers=3, hidden=2, inner=4, vocabulary=24, block_weights=32, heads=1, head_size=2
)
TOKENS = 7


def describe(layers: Split, schedule: str, num_microbatches: int, *, recompute: bool) -> str:
    split = StageSplit(layers, SIZES, num_stages=len(layers), seq_len=TOKENS)
    return split.describe(
        layers, schedule=schedule, num_microbatches=num_microbatches, recompute=recompute
    )


# Stage 0 has two blocks, stage 1 has one block and the head; a block's F, I and W take 1 each. The
# head computes its input's gradient in F, and its weights' gradient in F (gpipe, 1f1b) or in W
# (zb-h1).
@pytest.mark.parametrize(
    ("schedule", "recompute", "bubble"),
    [
        # F 2, B 4 and F 4, B 2: stage 0 waits from 4 to 12, its B1 ends at 20; each computes for
        # 12.
        ("gpipe", False, "40.0%"),
        # Stage 1 runs F0 B0 F1 B1 from 2 to 14; stage 0 runs B0 from 8, and B1 from 14 to 18.
        ("1f1b", False, "33.3%"),
        # B 6 and 3: stage 1 runs from 2 to 16, stage 0 runs B0 from 9, B1 to 22; they compute for
        # 16 and 14.
        ("1f1b", True, "31.8%"),
        # F 2, I 2, W 2 and F 3, I 1, W 2: stage 1 runs from 2 to 14, stage 0 waits from 4 to 6.
        ("zb-h1", False, "14.3%"),
    ],
)
def test_the_bubble_to_expect_is_that_of_the_schedule(
    schedule: str, recompute: bool, bubble: str
) -> None:
    line = describe(Split((2, 1)), schedule, 2, recompute=recompute)
    assert line == (
        "layers of the stages: 2,1; shares of the multiply-adds: 50.0%, 50.0%; the slowest stage "
        f"has 0.0% more than the mean; {schedule} of 2 microbatches: expected bubble {bubble}"
    )


def test_one_stage_never_idles() -> None:
    line = describe(Split((3,)), "1f1b", 5, recompute=True)
    assert line.endswith("1f1b of 5 microbatches: expected bubble 0.0%")
