"""The machine that runs the checks: GPU, driver, versions, CPU, commit and date.

    python -m tests.gpu.machine

This prints the facts of the GPU as JSON. The driver runs it in a process of its own, because a
broken CUDA installation can hang at its first call. It also loads torch into the page cache, so
that the first check does not wait for the disk.
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch", "transformers", "cupy-cuda12x", "cupy-cuda13x", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "bitsandbytes", "numpy",
)  # fmt: skip
_NVIDIA_SMI = (
    "driver_version", "pstate", "clocks.max.sm", "power.limit", "temperature.gpu",
    "mig.mode.current", "pcie.link.gen.current", "pcie.link.width.current",
)  # fmt: skip

MachineFacts = dict[str, str]


def host_facts() -> MachineFacts:
    """Returns date, commit, CPU, memory and the versions of installed packages, without torch."""
    now = datetime.now(timezone.utc)
    facts = {"date": now.isoformat(timespec="seconds"), "commit": commit(), "CPU": cpu_name()}
    facts["cores"] = str(len(os.sched_getaffinity(0)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts["host memory"] = f"{memory / 2**30:.0f} GiB"
    facts["system"] = (
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def gpu_facts() -> MachineFacts:
    """Returns the GPU's name, memory and driver, and the versions that CUDA's libraries report.

    Without a GPU, the only fact is `no GPU`, with the reason.
    """
    import torch  # the driver imports this module, and must not wait for torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "torch is built without CUDA" if built is None else "torch finds no GPU"
        return {"no GPU": reason}
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "GPU": properties.name,
        "GPUs": str(torch.cuda.device_count()),
        "GPU memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "compute capability": f"{properties.major}.{properties.minor}",
        "SMs": str(properties.multi_processor_count),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "torch's NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }
    with suppress(ImportError, AttributeError):
        from cupy.cuda import nccl

        facts["CuPy's NCCL"] = str(nccl.get_version())
    query = [
        "nvidia-smi",
        "--id=0",
        f"--query-gpu={','.join(_NVIDIA_SMI)}",
        "--format=csv,noheader",
    ]
    values = first_line(query).split(", ")
    if len(values) == len(_NVIDIA_SMI):
        facts |= dict(zip(_NVIDIA_SMI, values, strict=True))
    return facts


def commit() -> str:
    """Returns the commit of the source code; `+` after it means that files are changed."""
    number = first_line(["git", "rev-parse", "HEAD"])
    changed = "+" if first_line(["git", "status", "--porcelain", "--untracked-files=no"]) else ""
    return f"{number}{changed}" if number else "unknown"


def cpu_name() -> str:
    """Returns the name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def first_line(command: Sequence[str]) -> str:
    """Returns the first line that a command prints; "" if the command fails or is not installed."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            return lines[0].strip()
    return ""


if __name__ == "__main__":
    print(json.dumps(gpu_facts()))
