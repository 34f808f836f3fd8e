"""Imports that a rank needs to train, for the fork server (see tests.support.preloaded).

The checks of tests/gpu import only these: they start few processes, and a machine that runs only
these checks can lack pytest and bitsandbytes.
"""

import importlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import of the library

MODULES = """
    torch.distributed transformers.models.auto.tokenization_auto
    transformers.tokenization_utils_tokenizers dist_clm_train training.run comm.process_groups
    modules.families.gptj modules.families.gptneox
"""
for name in MODULES.split():
    importlib.import_module(name)

# The tests' sources have about sixty documents; a prefetch of a thousand would read them seventeen
# times.
vars(importlib.import_module("tasks.tokenization.prefetch"))["BATCH_DOCUMENTS"] = 32
