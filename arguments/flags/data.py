"""Flags of the training data and the held-out data."""

from arguments.flag import fixed, free, unkept
from arguments.values import real, whole
from tasks.registry import TASKS

DATA_FLAGS = (
    fixed(
        "--task-name",
        "data sources as a[:weight],b[:weight],...; each source is a .jsonl, .jsonl.zst, .jsonl.gz "
        "or .parquet file, a folder of such files, a data set saved to disk by datasets, a hub "
        "name (org/name or org/name/configuration), or a registered task "
        f"({', '.join(TASKS)}); only rank 0 needs the files",
        required=True,
        common=True,
        ranks="own",
    ),
    fixed(
        "--doc-separator",
        "text inserted before each document; default: an end-of-text token after each document; "
        "in bash, write a newline as $'\\n'",
    ),
    unkept(
        "--train-on",
        "completion: the loss covers only completions and the turns of the assistant or bot; a "
        "text that is no conversation is trained completely",
        "all",
        choices=("all", "completion"),
    ),
    unkept(
        "--pack",
        "concat: documents are joined end to end, and a token sees all tokens before it in its "
        "block; document: attention and positions stay inside a document, and only documents that "
        "are longer than a block are cut",
        "concat",
        choices=("concat", "document"),
    ),
    unkept(
        "--data-workers",
        "processes on rank 0 that tokenize ahead of training; 0: the training process tokenizes",
        1,
        whole(0),
    ),
    free(
        "--bad-lines",
        "for a line that is not a valid document: error ends the run; skip leaves the line out and "
        "lists it in bad_lines.txt in --checkpoint-path",
        "error",
        choices=("error", "skip"),
    ),
    free(
        "--max-bad-share",
        "with --bad-lines skip: the largest share of bad lines among the lines read so far (at "
        "least 1000); a larger share ends the run",
        0.01,
        real(at_most=1.0),
    ),
    unkept(
        "--preview-data",
        "print the first N blocks as text, with trained text in green, and numbers about the "
        "mixture, then exit; needs no weights and no other rank",
        None,
        whole(1),
        metavar="N",
    ),
    free(
        "--evaluation-data",
        "sets of held-out data as [name=]source,[name=]source,...; each source is a file, folder "
        "or task, as in --task-name; default of a name: the name of the file, folder or task",
        common=True,
        ranks="own",
    ),
    free(
        "--evaluation-steps",
        "iterations between evaluations; 0: only before the first and after the last iteration",
        0,
        whole(0),
        common=True,
    ),
    free("--evaluation-num-batch", "batches of each held-out set; default: all", None, whole(1)),
)
