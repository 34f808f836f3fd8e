"""Benchmark of text to blocks: throughput beside raw tokenizers, memory, and start-up time.

    python benchmarks/data.py [--large-mb 2000] [--rounds 7]

The benchmark compares our side, which makes blocks from texts, with a peer that only tokenizes the
texts. The texts are the documentation strings of Python's standard library, repeated; the tokenizer
is a byte-level BPE that is trained on these texts. The peer is the tokenizers library itself. It
runs as many single-threaded processes as our side has workers, and gets the same texts from memory
in lists of 256. Our side reads the texts from a .jsonl file in shuffled order, masks, packs and
batches them in the workers and the main process. The two sides are measured alternately.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from example_scripts.quickstart_model import docstrings, unique
from modules.matmul.cpu_info import CpuInfo
from tasks.loader import BatchLoader
from tasks.source_spec import SourceSpec
from tasks.sources.line_index import load_line_index
from tasks.stream import open_training_stream

VOCAB_SIZE = 16_384
SEQ_LENGTH, ROWS = 2048, 8
LIST = 256
BATCHES = 150  # batches per round
BLOCKS_FOR_MEMORY = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large-mb", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"{CpuInfo.of_this_machine().name}, {os.cpu_count()} cores; 1 MB is 1e6 bytes")
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), large_mb=args.large_mb, rounds=args.rounds)


def measure(folder: Path, *, large_mb: int, rounds: int) -> None:
    texts = list(unique(docstrings(Path(sysconfig.get_paths()["stdlib"]))))
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(folder / "tokenizer")
    small = write(folder / "small.jsonl", texts, megabytes=10)
    large = write(folder / "large.jsonl", texts, megabytes=large_mb)
    tiny = write(folder / "tiny.jsonl", texts[:1], megabytes=0)
    show_index(large, tiny, tokenizer)
    for path in (small, large):
        script = f"import benchmarks.data as d; d.show_peak({str(path)!r}, {str(folder)!r})"
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    for workers in (1, 2):
        show_throughput(small, texts, tokenizer, workers=workers, rounds=rounds)


def train_tokenizer(texts: Sequence[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<eos>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def write(path: Path, texts: Sequence[str], *, megabytes: int) -> Path:
    """Writes all texts as lines, and repeats them until the file has at least `megabytes`."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    with path.open("wb") as file:
        file.write(lines)
        while file.tell() < megabytes * 1e6:
            file.write(lines)
    return path


def megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


def open_stream(path: Path, tokenizer: Any, workers: int = 0) -> Any:
    return open_training_stream(
        [SourceSpec(str(path))], tokenizer, seq_len=SEQ_LENGTH, seed=1, num_workers=workers
    )


def show_index(large: Path, tiny: Path, tokenizer: Any) -> None:
    start = time.perf_counter()
    lines = len(load_line_index(str(large)))
    seconds = time.perf_counter() - start
    print(
        f"index of {megabytes(large):.0f} MB, {lines:,} lines: {seconds:.2f} s, "
        f"{megabytes(large) / seconds:.0f} MB/s"
    )
    for path in (tiny, large, tiny, large):
        start = time.perf_counter()
        open_stream(path, tokenizer).next_block()
        seconds = time.perf_counter() - start
        print(f"  from opening {megabytes(path):.0f} MB to the first block: {seconds * 1e3:.1f} ms")


def show_peak(path: str, folder: str) -> None:
    """Prints the peak memory (RSS) of this process and its worker; must run in a new process."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{folder}/tokenizer")
    stream = open_stream(Path(path), tokenizer, workers=1)
    for _ in range(BLOCKS_FOR_MEMORY):
        stream.next_block()
    (worker,) = multiprocessing.active_children()
    peaks = [peak_of("self"), peak_of(str(worker.pid))]
    stream.close()
    print(
        f"{BLOCKS_FOR_MEMORY} blocks of {megabytes(Path(path)):.0f} MB: peak memory "
        f"{peaks[0]:.0f} MB, its worker's {peaks[1]:.0f}"
    )


def peak_of(pid: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


def show_throughput(
    path: Path, texts: Sequence[str], tokenizer: Any, *, workers: int, rounds: int
) -> None:
    loader = BatchLoader(open_stream(path, tokenizer, workers), rows=ROWS)
    ours_once(loader)
    ends = [start_peer(texts, tokenizer, part, workers) for part in range(workers)]
    peer_once(ends)
    ratios, speeds = [], []
    for _ in range(rounds):
        ours, peer = ours_once(loader), peer_once(ends)
        ratios.append(ours / peer)
        speeds.append((ours, peer))
    loader.close()
    for end in ends:
        end.send(False)
    ours, peer = (median(side) for side in zip(*speeds, strict=True))
    print(
        f"{workers} workers: {ours / 1e6:.2f} million tokens/s, tokenizers alone {peer / 1e6:.2f}: "
        f"{ours / peer:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def ours_once(loader: BatchLoader) -> float:
    """Loads BATCHES batches; returns the tokens per second."""
    start = time.perf_counter()
    for _ in range(BATCHES):
        loader.next()
    return BATCHES * ROWS * SEQ_LENGTH / (time.perf_counter() - start)


def start_peer(texts: Sequence[str], tokenizer: Any, part: int, parts: int) -> Connection:
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    backend = tokenizer.backend_tokenizer
    process = multiprocessing.get_context("spawn").Process(
        target=peer, args=(theirs, list(texts[part::parts]), backend), daemon=True
    )
    process.start()
    return mine


def peer(end: Connection, texts: list[str], tokenizer: Tokenizer) -> None:
    """Receives token counts; for each, encodes at least that many and sends how many it encoded."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    lists = [texts[start : start + LIST] for start in range(0, len(texts), LIST)]
    while wanted := end.recv():
        done = 0
        while done < wanted:
            for part in lists:
                encoded = tokenizer.encode_batch_fast(part, add_special_tokens=False)
                done += sum(len(one.ids) for one in encoded)
        end.send(done)


def peer_once(ends: Sequence[Connection]) -> float:
    start = time.perf_counter()
    for end in ends:
        end.send(BATCHES * ROWS * SEQ_LENGTH // len(ends))
    done: int = sum(end.recv() for end in ends)
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
