"""What a run reads: rank 0's tokenizer, training batches and held-out text."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint.files.layer_shards import check_companions
from checkpoint.files.model_folder import companion_files
from pipeline_parallel.batch_scatter import HostBatch
from tasks.evaluation import evaluation_batches
from tasks.evaluation_sets import parse_evaluation_data
from tasks.loader import BatchLoader
from tasks.open import open_source
from tasks.preview import describe_mixture, look_at, preview_blocks
from tasks.sources.bad_lines import BadLines
from tasks.stream import open_documents, open_training_stream
from tasks.tokenization.encoder import Encoder
from tasks.tokenization.tokenizer import check_vocabulary, load_tokenizer


class TrainingData:
    """Rank 0's data. Other ranks, which read none, do not make one."""

    def __init__(self, args: argparse.Namespace, *, vocab_size: int) -> None:
        self._args = args
        self._rows = args.batch_size * args.data_group_size
        if Path(args.tokenizer_name).resolve() == args.model_name.resolve():
            check_companions(args.model_name)
        self.tokenizer = load_tokenizer(args.tokenizer_name)
        check_vocabulary(self.tokenizer, vocab_size)

    def open_loader(self, state: dict[str, Any] | None) -> BatchLoader:
        """Batches of all replicas, from the start or from where a checkpoint stands."""
        args = self._args
        stream = open_training_stream(
            args.sources,
            self.tokenizer,
            seq_length=args.seq_length,
            seed=args.seed,
            separator=args.doc_separator,
            train_on=args.train_on,
            pack=args.pack,
            bad_lines=_bad_lines(args),
            num_workers=args.data_workers,
        )
        if state is not None:
            stream.restore(state)
        return BatchLoader(stream, rows=self._rows)

    def open_evaluation(self) -> dict[str, Iterator[HostBatch]]:
        """Each set of held-out text from its beginning, by name; none where none is asked for."""
        given = self._args.evaluation_data
        sets = [] if given is None else parse_evaluation_data(given)
        return {one.name: self._batches_of(one.source) for one in sets}

    def check_evaluation(self) -> None:
        """Raises ValueError for a set that yields nothing to predict, or is bad up to there."""
        for batches in self.open_evaluation().values():
            next(batches)

    def _batches_of(self, source: str) -> Iterator[HostBatch]:
        args = self._args
        return evaluation_batches(
            source,
            self.tokenizer,
            seq_length=args.seq_length,
            rows=self._rows,
            separator=args.doc_separator,
            train_on=args.train_on,
            pack=args.pack,
            bad_lines=_bad_lines(args),
            max_batches=args.evaluation_num_batch,
        )


def preview_data(args: argparse.Namespace, *, colour: bool) -> Iterator[str]:
    """What --preview-data prints: the first blocks, and the mixture in numbers."""
    tokenizer = load_tokenizer(args.tokenizer_name)
    options = {
        "seq_length": args.seq_length,
        "seed": args.seed,
        "separator": args.doc_separator,
        "train_on": args.train_on,
        "pack": args.pack,
        "bad_lines": _bad_lines(args),
    }
    stream = open_training_stream(args.sources, tokenizer, **options)
    yield from preview_blocks(stream, tokenizer, args.preview_data, colour=colour)
    encoder = Encoder(tokenizer, args.doc_separator, args.train_on)
    found = [
        look_at(
            open_documents(open_source(spec.name), seed=args.seed, bad_lines=_bad_lines(args)),
            encoder,
            seq_length=args.seq_length,
            pack=args.pack,
        )
        for spec in args.sources
    ]
    rows = args.total_steps * args.batch_size * args.data_group_size
    yield describe_mixture(found, stream.weights(), run_blocks=rows)


def _bad_lines(args: argparse.Namespace) -> BadLines:
    """What --bad-lines asks for; all that are skipped in a run are named in one file."""
    if args.bad_lines == "error":
        return BadLines()
    return BadLines(args.checkpoint_path / "bad_lines.txt", max_share=args.max_bad_share)


def checkpoint_extras(model_folder: Path, name: str, tokenizer: Any) -> dict[str, bytes]:
    """The small files that every checkpoint holds: config.json and tokenizer, by name.

    `name` is --tokenizer-name, from which `tokenizer` was loaded; where it is no folder, that is
    what is kept.
    """
    folder = Path(name)
    if folder.is_dir():
        files = _read(folder)
    else:
        with tempfile.TemporaryDirectory() as saved:
            tokenizer.save_pretrained(saved)
            files = _read(Path(saved))
    return {**files, "config.json": (model_folder / "config.json").read_bytes()}


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in companion_files(folder)}
