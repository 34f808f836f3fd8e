"""Imports of the fork server from which tests start processes (see tests.support.launcher).

Without the server, each process would need seconds for its imports. The server does not import
training.session, because hooks must replace functions before that module imports them by name.
"""

import gc
import importlib
import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import of the library

MODULES = """
    torch.distributed matplotlib.backends.backend_agg matplotlib.figure
    transformers.models.auto.tokenization_auto transformers.tokenization_utils_tokenizers
    transformers.models.gptj.modeling_gptj transformers.models.gpt_neox.modeling_gpt_neox
    dist_clm_train training.run checkpoint.conversion.to_hf comm.process_groups monitor.plot
    modules.families.gptj modules.families.gptneox tests.support.cases tests.support.models
"""
OPTIONAL = ("pytest", "bitsandbytes")  # a machine that runs only the checks for a GPU lacks them
for name in MODULES.split() + [name for name in OPTIONAL if importlib.util.find_spec(name)]:
    importlib.import_module(name)

# The tests' sources have about sixty documents; a prefetch of a thousand would read them seventeen
# times.
vars(importlib.import_module("tasks.tokenization.prefetch"))["BATCH_DOCUMENTS"] = 32

gc.freeze()  # so no fork scans the imported objects or copies their pages
