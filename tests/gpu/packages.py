"""The packages that the checks need: which are missing, and their installation from wheels.

    python -m tests.gpu.packages --device cuda --wheels FOLDER --target FOLDER

Without missing packages it does nothing. Otherwise it installs the wheels of `--wheels` that this
Python lacks into `--target`, without a network. It uses only the standard library.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
_NOT_NEEDED = {"datasets", "pyarrow", "matplotlib", "wandb"}  # no check imports them
_MODULES = {"netifaces-plus": "netifaces"}  # of packages whose module has another name


def main(argv: Sequence[str] | None = None) -> int:
    """Installs what is missing; returns 2 if a package is missing afterwards."""
    parser = argparse.ArgumentParser(description="Installs missing packages from wheels.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheels", type=Path, help="folder of wheels")
    parser.add_argument("--target", type=Path, required=True, help="folder to install into")
    args = parser.parse_args(argv)
    lacking = missing(args.device)
    if lacking and args.wheels is not None:
        install(args.wheels, args.target)
        sys.path.insert(0, str(args.target))
        lacking = missing(args.device)
    if lacking:
        print(advice(lacking, args.wheels), file=sys.stderr)
    return 2 if lacking else 0


def missing(device: str) -> list[str]:
    """Returns the needed packages that this Python cannot import."""
    lines = _REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    names = [name[0] for line in lines if (name := re.match(r"[\w-]+", line))]
    needed = [name for name in names if name not in _NOT_NEEDED]
    if device == "cuda":
        needed.append("cupy")
    return [name for name in needed if find_spec(_MODULES.get(name, name)) is None]


def install(wheels: Path, target: Path) -> None:
    """Installs the wheels of packages that this Python lacks.

    The folder can have wheels of packages that are here, such as dependencies that pip downloaded
    as well; these are not installed, so torch and its libraries stay as they are.
    """
    files = [path for path in sorted(wheels.glob("*.whl")) if not _is_installed(path)]
    if not files:
        return
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    places = ["--no-index", "--find-links", str(wheels), "--no-deps", "--target", str(target)]
    subprocess.run([*pip, *places, *map(str, files)], check=False)


def advice(lacking: Sequence[str], wheels: Path | None) -> str:
    """Returns what is missing, and the commands that fetch and use its wheels."""
    names = " ".join(lacking)
    if "cupy" in lacking:
        names = names.replace("cupy", "cupy-cuda13x")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    where = "" if wheels is None else f", and {wheels} has no wheel that fits Python {python}"
    return (
        f"{sys.executable} lacks {', '.join(lacking)}{where}. Fetch the wheels on a machine with a "
        "network, and copy the folder here (for CUDA 12: cupy-cuda12x):\n"
        f"  pip download --no-deps --only-binary :all: --python-version {python} "
        f"--platform manylinux2014_x86_64 --dest wheels {names}\n"
        "  bash tests/gpu/run.sh --wheels wheels"
    )


def _is_installed(wheel: Path) -> bool:
    try:
        version(wheel.name.partition("-")[0])
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
