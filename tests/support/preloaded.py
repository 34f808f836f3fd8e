"""The imports of the server that tests' processes are forked from (tests.support.launcher).

Each of them would take seconds for the imports of its own. training.session is left out: it binds
functions that hooks replace.
"""

import gc
import importlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import

MODULES = """
    torch.distributed pytest bitsandbytes matplotlib.backends.backend_agg matplotlib.figure
    transformers.models.auto.tokenization_auto transformers.tokenization_utils_tokenizers
    transformers.models.gptj.modeling_gptj transformers.models.gpt_neox.modeling_gpt_neox
    dist_clm_train training.run checkpoint.conversion.to_hf comm.process_groups monitor.plot
    modules.families.gptj modules.families.gptneox tests.support.cases tests.support.models
"""
for name in MODULES.split():
    importlib.import_module(name)

# The tests' sources have some sixty documents: a thousand, ahead, are all of them seventeen times.
vars(importlib.import_module("tasks.tokenization.prefetch"))["BATCH_DOCUMENTS"] = 32

gc.freeze()  # no fork walks through all that was imported, nor copies its pages for that
