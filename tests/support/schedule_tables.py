"""Expected timetables and action orders; a test fails if this module has none for a schedule."""

from collections.abc import Callable

# (pp-mode, stages, microbatches): timetable in which F, I and W take one slot and B two
TIMETABLES = {
    ("gpipe", 3, 3): """\
stage 0   F0 F1 F2 .  .  .  .  .  .  B0 == B1 == B2 ==
stage 1   .  F0 F1 F2 .  .  .  B0 == B1 == B2 == .  .
stage 2   .  .  F0 F1 F2 B0 == B1 == B2 == .  .  .  .
""",
    ("1f1b", 3, 4): """\
stage 0   F0 F1 F2 .  .  .  .  B0 == F3 B1 == .  B2 == .  B3 ==
stage 1   .  F0 F1 .  .  B0 == F2 B1 == F3 B2 == .  B3 == .  .
stage 2   .  .  F0 B0 == F1 B1 == F2 B2 == F3 B3 == .  .  .  .
""",
    ("zb-h1", 3, 4): """\
stage 0   F0 F1 F2 .  .  B0 == F3 B1 == B2 == B3 ==
stage 1   .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
stage 2   .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
""",
}

# cases without a timetable: fewer microbatches than stages, one stage, one microbatch
ORDERS = {
    ("gpipe", 1, 2): ["F0 F1 B0 B1"],
    ("1f1b", 1, 2): ["F0 B0 F1 B1"],
    ("1f1b", 4, 2): ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"],
    ("zb-h1", 1, 2): ["F0 B0 F1 B1"],
    ("zb-h1", 3, 1): ["F0 B0", "F0 I0 W0", "F0 I0 W0"],
    ("zb-h1", 4, 2): ["F0 F1 B0 B1", "F0 F1 I0 I1 W0 W1", "F0 F1 I0 I1 W0 W1", "F0 I0 F1 I1 W0 W1"],
}

# most microbatches in flight on `stage` of p stages with m microbatches
IN_FLIGHT: dict[str, Callable[[int, int, int], int]] = {
    "gpipe": lambda stage, p, m: m,
    "1f1b": lambda stage, p, m: min(p - stage, m),
    "zb-h1": lambda stage, p, m: min(p, m),
}
