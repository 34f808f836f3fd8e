"""The driver of the checks for a machine with a GPU: it runs them in order, and sums them up.

    python -m tests.gpu.driver [--device cuda|cpu] [--only 0,1] [--quick] [--out FOLDER]

Each check is a process of its own, with its own time limit; a check that fails, hangs or crashes
does not end the next one. The folder gets `gpu.json`, and for each check its output and its rows.
The exit status is 0 if no check failed, else 1.

The driver uses only the standard library, so it also works where torch does not.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from common.files import write_json
from common.text import format_table
from tests.gpu.child import GRACE, ChildEnd, run_child, stacks_in
from tests.gpu.machine import ROOT, MachineFacts, host_facts
from tests.gpu.report import EXIT_STATUS, FAILED, NOT_HERE, OK, Row, format_row

TOTAL_SECONDS = 480.0  # of all checks on CUDA
_FACTS_SECONDS = 45.0  # of the GPU's facts; usually 5
_SHOWN_STACK_LINES = 80  # of a check that hangs; its file has all
_RUN_MODULE = (
    "import sys; from tests.gpu.report import run_module; run_module(sys.argv[1], sys.argv[2:])"
)


@dataclass(frozen=True)
class CheckEntry:
    """An entry of the table of checks.

    module: its last part is `check_<number>_<name>`.
    seconds: the planned time on CUDA.
    cpu_seconds: the planned time on a CPU with two cores; for the quick part a generous one.
    needs_gpu: whether no part of the check means anything on a CPU.
    """

    number: int
    module: str
    seconds: float
    cpu_seconds: float
    needs_gpu: bool = False

    @property
    def name(self) -> str:
        return self.module.partition(f"check_{self.number}_")[2]

    def planned(self, device: str) -> float:
        """Returns the planned seconds on "cuda" or "cpu"."""
        return self.seconds if device == "cuda" else self.cpu_seconds


CHECKS = (
    CheckEntry(0, "tests.gpu.check_0_inventory", 15, 60),
    CheckEntry(1, "tests.gpu.check_1_spin", 75, 60, needs_gpu=True),
    CheckEntry(2, "tests.gpu.check_2_numerics", 60, 180),
    CheckEntry(3, "tests.gpu.check_3_nccl", 105, 240),
    CheckEntry(4, "tests.gpu.check_4_worlds", 60, 180),
    CheckEntry(5, "tests.gpu.check_5_memory", 45, 180),
    CheckEntry(6, "tests.gpu.check_6_kernels", 25, 60),
    CheckEntry(7, "tests.gpu.check_7_speed", 85, 120),
)


@dataclass
class CheckResult:
    """The result of one check; `output` is the file of its output, "" if it did not run."""

    number: int
    name: str
    status: str
    note: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""


def main(argv: Sequence[str] | None = None, checks: Sequence[CheckEntry] = CHECKS) -> int:
    """Runs the checks that the command line chooses, and returns the exit status."""
    began = time.monotonic()
    args = _parse(argv, checks)
    out = (args.out or Path(tempfile.mkdtemp(prefix="gpu-checks-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("check_*.json"), *out.glob("check_*.txt")):
        old.unlink()
    machine = host_facts()
    if args.device == "cuda":
        machine |= _gpu_facts(out)
    for name, value in machine.items():
        print(f"{name}: {value}")
    reasons = {check.number: _reason(check, args, machine) for check in checks}
    left = [check for check in checks if not reasons[check.number]]
    all_planned = sum(check.planned(args.device) for check in left)
    total = args.total or (TOTAL_SECONDS if args.device == "cuda" else all_planned)
    results = []
    for check in checks:
        if reason := reasons[check.number]:
            results.append(CheckResult(check.number, check.name, NOT_HERE, reason))
        else:
            planned = [c.planned(args.device) for c in left]
            limit = share(total - GRACE - (time.monotonic() - began), planned)
            left.remove(check)
            results.append(_run(check, args, out, limit))
        _write(out, args, machine, results, time.monotonic() - began)
    _print_summary(results, out)
    if "no GPU" in machine:
        print(f"{machine['no GPU']}: --device cpu runs all that means anything on a CPU")
        return 1
    return int(any(result.status == FAILED for result in results))


def _parse(argv: Sequence[str] | None, checks: Sequence[CheckEntry]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/gpu/run.sh", description="Runs the checks for a machine with a GPU."
    )
    numbers = [check.number for check in checks]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="numbers of checks, such as 0,1,2")
    parser.add_argument("--quick", action="store_true", help="only what the default tests run")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and the outputs")
    parser.add_argument("--total", type=float, help="seconds for all checks together")
    args = parser.parse_args(argv)
    words = [word.strip() for word in args.only.split(",") if word.strip()]
    if unknown := [word for word in words if word not in map(str, numbers)]:
        parser.error(
            f"--only {args.only}: there is no check {unknown[0]}; the checks are {numbers}"
        )
    args.only = set(map(int, words)) or set(numbers)
    return args


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def share(left: float, planned: Sequence[float]) -> float:
    """Returns the first check's share of the seconds that are left for all planned checks.

    Time that earlier checks did not use goes to all later ones, but no check gets more than twice
    its planned time, so that a hang of one of a few checks does not take minutes.
    """
    return max(0.0, min(2 * planned[0], left * planned[0] / sum(planned)))


def _gpu_facts(out: Path) -> MachineFacts:
    """Returns the facts of the GPU, or the fact `no GPU` with the reason."""
    command = [sys.executable, "-m", "tests.gpu.machine"]
    output = out / "machine.txt"
    end = run_child(command, cwd=ROOT, environ=os.environ, output=output, limit=_FACTS_SECONDS)
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
        facts: MachineFacts = json.loads([line for line in lines if line.startswith("{")][-1])
        return facts  # libraries may print warnings before and after it
    except (IndexError, ValueError):
        how = "hung" if end.hung else f"ended with status {end.status}"
        return {"no GPU": f"torch's first calls of CUDA {how}; see {output}"}


def _reason(check: CheckEntry, args: argparse.Namespace, machine: MachineFacts) -> str:
    """Returns why the check does not run; "" if it runs."""
    if check.number not in args.only:
        return "left out by --only"
    if "no GPU" in machine:
        return machine["no GPU"]
    if find_spec(check.module) is None:
        return f"{check.module.replace('.', '/')}.py does not exist"
    return "it needs a GPU" if check.needs_gpu and args.device == "cpu" else ""


def _run(check: CheckEntry, args: argparse.Namespace, out: Path, limit: float) -> CheckResult:
    """Runs one check, and returns its result."""
    stem = out / check.module.rpartition(".")[2]
    output, rows = stem.with_suffix(".txt"), stem.with_suffix(".json")
    print(f"\n== check {check.number}, {check.name}: at most {limit:.0f} s", flush=True)
    command = [sys.executable, "-c", _RUN_MODULE, check.module, "--device", args.device]
    command += ["--limit", f"{limit:.2f}", "--json", str(rows), *["--quick"] * args.quick]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    end = run_child(command, cwd=ROOT, environ=environ, output=output, limit=limit)
    report: dict[str, Any] = {}
    if rows.exists():
        report = json.loads(rows.read_text(encoding="utf-8"))
    result = CheckResult(check.number, check.name, FAILED, "", end.seconds, limit)
    result.rows, result.output = report.get("rows", []), str(output)
    result.note = _abnormal_end(end, report, output)
    if not result.note:
        result.status = report["status"]
        result.note = report["missing"] if result.status == NOT_HERE else _failed_rows(result)
    return result


def _abnormal_end(end: ChildEnd, report: dict[str, Any], output: Path) -> str:
    """Returns how a check ended that did not end as `run_module` does; "" if it did."""
    if end.hung:
        return f"hung: {'stacks' if stacks_in(output) else 'no stacks'} in {output}"
    if end.status < 0:
        return f"ended by {signal.Signals(-end.status).name}: see {output}"
    if not report.get("complete") or EXIT_STATUS[report["status"]] != end.status:
        return f"ended early with exit status {end.status}: see {output}"
    return ""


def _failed_rows(result: CheckResult) -> str:
    failed = [row["name"] for row in result.rows if row["ok"] is False]
    return f"{len(failed)} of {len(result.rows)} rows failed" if failed else ""


def _write(
    out: Path,
    args: argparse.Namespace,
    machine: MachineFacts,
    results: Sequence[CheckResult],
    seconds: float,
) -> None:
    """Writes gpu.json, also after each check, because this process may be ended, too."""
    statuses = {result.status for result in results}
    status = FAILED if FAILED in statuses else OK if OK in statuses else NOT_HERE
    run = {"status": status, "device": args.device, "quick": args.quick, "seconds": seconds}
    checks = [asdict(result) for result in results]
    write_json(out / "gpu.json", {**run, "machine": machine, "checks": checks})


def _print_summary(results: Sequence[CheckResult], out: Path) -> None:
    """Prints stacks, failed rows, and the table with a line for each check."""
    for result in results:
        failed = [Row(**row) for row in result.rows if row["ok"] is False]
        stacks = stacks_in(Path(result.output)) if result.status == FAILED and result.output else ""
        if failed or stacks:
            print(f"\n== failed in check {result.number}, {result.name}")
            print("\n".join([*map(format_row, failed), *stacks.splitlines()[:_SHOWN_STACK_LINES]]))
    lines = [("check", "", "status", "seconds", "limit", "note")]
    for result in results:
        times = (f"{result.seconds:.1f}", f"{result.limit:.0f}") if result.output else ("", "")
        lines.append((str(result.number), result.name, result.status, *times, result.note))
    print(f"\n{format_table(lines)}\n{out / 'gpu.json'}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _exit_on_signal)  # so that SIGTERM ends the running check, too
    sys.exit(main())
