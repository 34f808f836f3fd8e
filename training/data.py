"""The data of a run: rank 0's tokenizer, training batches and held-out text."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arguments.settings import Settings
from checkpoint.files.layer_shards import check_companions
from checkpoint.files.model_folder import companion_files
from tasks.evaluation import evaluation_batches
from tasks.evaluation_sets import parse_evaluation_data
from tasks.loader import BatchLoader
from tasks.mixture import BlockStream
from tasks.open import open_source
from tasks.packing.blocks import TokenBatch
from tasks.preview import describe_mixture, preview_blocks, sample_source
from tasks.shuffling.shuffle import shuffle_source
from tasks.sources.bad_lines import BadLines
from tasks.stream import open_training_stream
from tasks.tokenization.encoder import Encoder
from tasks.tokenization.tokenizer import check_vocabulary, load_tokenizer


class TrainingData:
    """The tokenizer and the data of rank 0. Other ranks read no data and have no TrainingData."""

    def __init__(self, settings: Settings, *, vocab_size: int) -> None:
        self._settings = settings
        self._rows = settings.update.batch_size * settings.parallel.data_group_size
        if Path(settings.model.tokenizer_name).resolve() == settings.model.model_name.resolve():
            check_companions(settings.model.model_name)
        self.tokenizer = load_tokenizer(settings.model.tokenizer_name)
        check_vocabulary(self.tokenizer, vocab_size)

    def open_loader(self, state: dict[str, Any] | None) -> BatchLoader:
        """Returns a loader of all replicas' batches; it continues from `state` if there is one."""
        workers = self._settings.data.data_workers
        stream = _open_stream(self._settings, self.tokenizer, num_workers=workers)
        if state is not None:
            stream.restore(state)
        return BatchLoader(stream, rows=self._rows)

    def open_evaluation(self) -> dict[str, Iterator[TokenBatch]]:
        """Returns set name -> batches of the held-out set; each call starts at the first batch."""
        given = self._settings.data.evaluation_data
        sets = [] if given is None else parse_evaluation_data(given)
        return {held_out.name: self._batches_of(held_out.source) for held_out in sets}

    def check_evaluation(self) -> None:
        """Raises ValueError if the first batch of a held-out set is empty or has a bad line."""
        for batches in self.open_evaluation().values():
            next(batches)

    def _batches_of(self, source: str) -> Iterator[TokenBatch]:
        data, update = self._settings.data, self._settings.update
        return evaluation_batches(
            source,
            self.tokenizer,
            seq_len=update.seq_length,
            rows=self._rows,
            separator=data.doc_separator,
            train_on=data.train_on,
            pack=data.pack,
            bad_lines=_bad_lines(self._settings),
            max_batches=data.evaluation_num_batch,
        )


def preview_data(settings: Settings, *, num_blocks: int, colour: bool) -> Iterator[str]:
    """Yields the text of --preview-data: the first blocks, then numbers about the mixture."""
    data, update = settings.data, settings.update
    tokenizer = load_tokenizer(settings.model.tokenizer_name)
    stream = _open_stream(settings, tokenizer, num_workers=0)
    yield from preview_blocks(stream, tokenizer, num_blocks, colour=colour)
    encoder = Encoder(tokenizer, data.doc_separator, data.train_on)
    samples = []
    for spec in data.sources:
        source = open_source(spec.name)
        documents = shuffle_source(source, seed=update.seed, bad_lines=_bad_lines(settings))
        sample = sample_source(documents, encoder, seq_len=update.seq_length, pack=data.pack)
        samples.append(sample)
    rows = update.total_steps * update.batch_size * settings.parallel.data_group_size
    yield describe_mixture(samples, stream.weights(), run_blocks=rows)


def _open_stream(settings: Settings, tokenizer: Any, *, num_workers: int) -> BlockStream:
    data = settings.data
    return open_training_stream(
        data.sources,
        tokenizer,
        seq_len=settings.update.seq_length,
        seed=settings.update.seed,
        separator=data.doc_separator,
        train_on=data.train_on,
        pack=data.pack,
        bad_lines=_bad_lines(settings),
        num_workers=num_workers,
    )


def _bad_lines(settings: Settings) -> BadLines:
    """Returns the policy that --bad-lines requests; bad_lines.txt lists the skipped lines."""
    if settings.data.bad_lines == "error":
        return BadLines()
    path = settings.checkpoint.checkpoint_path / "bad_lines.txt"
    return BadLines(path, max_share=settings.data.max_bad_share)


def checkpoint_extras(model_folder: Path, name: str, tokenizer: Any) -> dict[str, bytes]:
    """Returns the files that every checkpoint gets, by name: config.json and the tokenizer's files.

    `name` is the value of --tokenizer-name. If `name` is a folder, the tokenizer's files are read
    from this folder; else from a temporary folder, to which the loaded `tokenizer` is saved.
    """
    if Path(name).is_dir():
        files = _read(Path(name))
    else:
        with tempfile.TemporaryDirectory() as saved:
            tokenizer.save_pretrained(saved)
            files = _read(Path(saved))
    return {**files, "config.json": (model_folder / "config.json").read_bytes()}


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in companion_files(folder)}
