"""Imports of the fork server from which tests start processes (see tests.support.launcher).

Without the server, each process would need seconds for its imports. The server does not import
training.session, because hooks must replace functions before that module imports them by name.
"""

import gc
import importlib

importlib.import_module("tests.support.preloaded_training")

MODULES = """
    pytest bitsandbytes matplotlib.backends.backend_agg matplotlib.figure
    transformers.models.gptj.modeling_gptj transformers.models.gpt_neox.modeling_gpt_neox
    checkpoint.conversion.to_hf monitor.plot tests.support.cases tests.support.models
"""
for name in MODULES.split():
    importlib.import_module(name)

gc.freeze()  # so no fork scans the imported objects or copies their pages
