"""What a process has imported when it is forked for a test, where each would take seconds for it.

It is imported for that alone: by the server that processes are forked from, and so by all of them
(tests.support.launcher). training.session is left out: it binds functions that hooks replace.
"""

import importlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import

for name in (
    "torch", "torch.distributed", "pytest", "dist_clm_train", "training.run", "tests.support.cases",
    "checkpoint.conversion.to_hf", "comm.process_groups", "monitor.plot", "modules.families.gptj",
    "modules.families.gptneox",
    "matplotlib.backends.backend_agg", "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
):  # fmt: skip
    importlib.import_module(name)

# The tests' sources have some sixty documents: a thousand, ahead, are all of them seventeen times.
vars(importlib.import_module("tasks.tokenization.prefetch"))["BATCH_DOCUMENTS"] = 32
