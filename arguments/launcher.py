"""Default values of flags, taken from torchrun or from other flags. This module needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TORCHRUN = (
    ("rank", "RANK", "0"),
    ("world_size", "WORLD_SIZE", "1"),
    ("cuda_id", "LOCAL_RANK", "0"),
)


def fill_defaults(values: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Sets flags that the user did not give; uses torchrun's variables if torchrun is the launcher.

    Args:
        values: the parsed flags by field name. The function changes this dictionary, and adds
            `start_id` and `agent_store` (see `arguments.settings.NetworkSettings`).
        environ: the environment variables.

    Raises:
        ValueError: a variable of torchrun is not a number.
    """
    launched = "TORCHELASTIC_RUN_ID" in environ
    given = environ if launched else {}
    for name, variable, default in _TORCHRUN:
        if values[name] is None:
            text = given.get(variable, default)
            if not text.isdecimal():
                raise ValueError(
                    f"torchrun's variable {variable} is {text!r}, expected a whole number"
                )
            values[name] = int(text)
    agent_hosts = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    values["agent_store"] = launched and values["dist_url"] is None and agent_hosts
    if values["dist_url"] is None:
        host, port = given.get("MASTER_ADDR", "127.0.0.1"), given.get("MASTER_PORT", "7033")
        values["dist_url"] = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
    values["start_id"] = ""
    if launched:
        restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        values["start_id"] = f"{environ['TORCHELASTIC_RUN_ID']}/{restart}"
    if values["tokenizer_name"] is None:
        values["tokenizer_name"] = str(values["model_name"])
    if values["checkpoint_path"] is None:
        values["checkpoint_path"] = Path("model_checkpoints") / values["model_name"].resolve().name
