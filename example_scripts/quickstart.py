"""Quick start: all steps from a Hugging Face model to a trained one, by commands that users type.

It makes a small GPT-NeoX and a corpus, cuts the model into layer shards, trains it in 2 pipelines
of 2 stages, kills every process halfway, resumes the run, converts the last checkpoint to the
Hugging Face format, and checks the result with transformers only. All files are in ./quickstart,
which is deleted at the start. quickstart.sh runs this script.
"""

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

OUT = Path("quickstart")
LOGS = OUT / "logs"
CHECKPOINTS = OUT / "checkpoints"
METRICS = CHECKPOINTS / "metrics.jsonl"
TRAINED = OUT / "small-neox-trained"
NUM_DOCUMENTS = 1000
WORLD_SIZE = 4
SEQ_LENGTH = 128
TOTAL_STEPS = 80
HALFWAY = TOTAL_STEPS // 2
LOST_STEPS = 3  # minimum number of steps between checkpoint and kill
SECONDS_TO_REPORT = 10.0  # limit for the other ranks to end after a rank failed
BEGIN = time.monotonic()

TRAIN = f"""
dist_clm_train.py --model-name {OUT}/shards/small-neox --model-type gptneox
--num-layers 2 --embedding-dim 192 --use-cuda false
--world-size {WORLD_SIZE} --pipeline-group-size 2 --data-group-size 2
--task-name {OUT}/train.jsonl --seq-length {SEQ_LENGTH} --data-workers 0
--batch-size 4 --micro-batch-size 2
--total-steps {TOTAL_STEPS} --warmup-steps 5 --lr 3e-3
--evaluation-data {OUT}/held_out.jsonl --evaluation-steps {HALFWAY}
--checkpoint-path {CHECKPOINTS} --checkpoint-steps {HALFWAY}
""".split()


class Ranks:
    """The ranks of the training command, each with a log; the end of a `with` block kills them."""

    def __init__(self, port: int) -> None:
        self._processes = []
        for rank in range(WORLD_SIZE):
            flags = ["--rank", str(rank), "--dist-url", f"tcp://127.0.0.1:{port}"]
            with (LOGS / f"rank_{rank}.log").open("ab") as log:
                command = [sys.executable, *TRAIN, *flags]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
                self._processes.append(process)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Ends all ranks with SIGKILL."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def are_running(self) -> bool:
        """Returns whether a rank still runs; ends the quick start if one has failed."""
        statuses = [process.poll() for process in self._processes]
        if any(statuses):
            deadline = time.monotonic() + SECONDS_TO_REPORT
            while None in statuses and time.monotonic() < deadline:
                time.sleep(0.1)
                statuses = [process.poll() for process in self._processes]
            fail("a rank failed", sorted(LOGS.glob("rank_*.log")))
        return None in statuses


def main() -> None:
    """Runs all steps; if a step fails, prints the end of its logs and exits with status 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the ranks, too
    shutil.rmtree(OUT, ignore_errors=True)
    LOGS.mkdir(parents=True)

    say("1. making a small GPT-NeoX in the Hugging Face format, and a corpus")
    # Imported after the first line is printed: the import of transformers takes some seconds.
    from example_scripts import quickstart_check, quickstart_model

    print(f"    {quickstart_model.make(OUT, NUM_DOCUMENTS)}")

    say("2. cutting the model into layer shards")
    run(f"convert_from_hf_gptneox.py --model-name {OUT}/hf/small-neox --save-dir {OUT}/shards")

    say(f"3. training {TOTAL_STEPS} steps in 2 pipelines of 2 stages: 4 processes, logs in {LOGS}")
    port = free_port()
    with Ranks(port) as ranks:
        while num_steps() < HALFWAY + LOST_STEPS:
            ranks.are_running()
            time.sleep(0.1)
    killed_at = num_steps()
    resumed_from = int((CHECKPOINTS / "latest").read_text())
    loss = quickstart_check.read_metrics(METRICS)[killed_at - 1]["loss"]

    say(
        f"4. killed all 4 with SIGKILL after step {killed_at}, at loss {loss:.2f}; the same command"
        f" resumes from the checkpoint of step {resumed_from}"
    )
    with Ranks(port) as ranks:
        while ranks.are_running():
            time.sleep(0.1)

    say("5. converting the last checkpoint back to the Hugging Face format, and verifying it")
    run(f"convert_to_hf_gptneox.py --ckpt-path {CHECKPOINTS} --save-path {TRAINED} --verify")

    say("6. loading it with from_pretrained, and comparing its perplexity with the reported one")
    quickstart_check.check_curve(METRICS, total_steps=TOTAL_STEPS, resumed_from=resumed_from)
    before, after, sample = quickstart_check.check_model(
        TRAINED, held_out=OUT / "held_out.jsonl", metrics=METRICS, seq_length=SEQ_LENGTH
    )
    print(sample)
    print(
        f"Shown: held-out perplexity fell from {before:.0f} to {after:.0f}, which transformers "
        f"computes too; killed at step {killed_at}, resumed from {resumed_from}."
    )
    print(f"Made: the loss curve {CHECKPOINTS / 'loss.png'}, and the model {TRAINED}.")
    print("Next: train your own model on your own data: docs/getting-started/own-data.md.")


def say(text: str) -> None:
    """Prints a line with the time since this script started."""
    minutes, seconds = divmod(int(time.monotonic() - BEGIN), 60)
    print(f"[{minutes}:{seconds:02d}] {text}", flush=True)


def run(command: str) -> None:
    """Runs a script of the project with its output in a log; shows the log if the script fails."""
    script, *flags = command.split()
    log = (LOGS / script).with_suffix(".log")
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, script, *flags], stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        fail(f"{script} failed", [log])


def fail(problem: str, logs: Sequence[Path]) -> None:
    """Exits with status 1, and prints the problem and the last lines of the logs."""
    ends = []
    for log in logs:
        lines = log.read_text(errors="replace").splitlines()
        ends += [f"the end of {log}:", *lines[-15:]]
    sys.exit("\n".join([f"quickstart: {problem}", *ends]))


def num_steps() -> int:
    """Returns the number of completed steps, which is the number of lines in metrics.jsonl."""
    return METRICS.read_bytes().count(b"\n") if METRICS.exists() else 0


def free_port() -> int:
    """Returns a TCP port on which no process listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
