"""The table of all flags of dist_clm_train.py, by the headings of --help.

The table says of each flag whether it may change on resume, and whether ranks may differ in it. A
new flag is one entry in a file of this package, one field of a group in `arguments.settings`, and
the code that uses it.
"""

from __future__ import annotations

from arguments.flag import Flag
from arguments.flags.data import DATA_FLAGS
from arguments.flags.model import MODEL_FLAGS
from arguments.flags.output import CHECKPOINT_FLAGS, OUTPUT_FLAGS
from arguments.flags.precision import PRECISION_FLAGS
from arguments.flags.processes import NETWORK_FLAGS, PARALLEL_FLAGS
from arguments.flags.update import UPDATE_FLAGS

FLAGS_BY_HEADING: dict[str, tuple[Flag, ...]] = {
    "model": MODEL_FLAGS,
    "processes": PARALLEL_FLAGS,
    "network": NETWORK_FLAGS,
    "data": DATA_FLAGS,
    "updates": UPDATE_FLAGS,
    "precision and memory": PRECISION_FLAGS,
    "checkpoints": CHECKPOINT_FLAGS,
    "checks and reports": OUTPUT_FLAGS,
}

FLAGS: tuple[Flag, ...] = tuple(flag for flags in FLAGS_BY_HEADING.values() for flag in flags)
