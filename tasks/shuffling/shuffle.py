"""The choice between a full and a buffered shuffle."""

import logging

from common.text import shown
from tasks.shuffling.buffered import CHUNK_DOCUMENTS, BufferedShuffle
from tasks.shuffling.full import FullShuffle
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import DataSource

logger = logging.getLogger(__name__)

Shuffle = BufferedShuffle | FullShuffle


def shuffle_source(
    source: DataSource,
    *,
    seed: int,
    chunk_documents: int = CHUNK_DOCUMENTS,
    bad_lines: BadLines | None = None,
) -> Shuffle:
    """Returns a full shuffle if the source can be read in any order, else a buffered shuffle."""
    if source.open_rows is not None:
        return FullShuffle(source, seed=seed, bad_lines=bad_lines)
    logger.info(
        f"{shown(source.name)}: shuffled in chunks of up to {chunk_documents} documents, because "
        "it can only be read in file order"
    )
    return BufferedShuffle(source, seed=seed, chunk_documents=chunk_documents, bad_lines=bad_lines)
