"""Flags of the training data and the held-out data."""

from arguments.flag import fixed, free, unkept
from arguments.values import real, whole
from tasks.registry import TASKS

DATA_FLAGS = (
    fixed(
        "--task-name",
        "a[:weight],b[:weight],...: each a .jsonl, .jsonl.zst, .jsonl.gz or .parquet file, a "
        "folder of them, a data set saved to disk by datasets, a hub name (org/name or org/name/"
        f"configuration), or a registered task ({', '.join(TASKS)}); only rank 0 needs the files",
        required=True,
        common=True,
        ranks="own",
    ),
    fixed(
        "--doc-separator",
        "text put before each document, instead of an end-of-text token after it; a newline is "
        "written $'\\n' in bash",
    ),
    unkept(
        "--train-on",
        "completion: the loss is over completions and the turns of the assistant or bot alone; "
        "texts that are no conversation are trained completely",
        "all",
        choices=("all", "completion"),
    ),
    unkept(
        "--pack",
        "concat: documents end to end, and a token sees all before it in its block; document: "
        "attention and positions stay inside a document, and none is cut that fits into a block",
        "concat",
        choices=("concat", "document"),
    ),
    unkept(
        "--data-workers",
        "processes that tokenize ahead of training, on rank 0; 0: training's own",
        1,
        whole(0),
    ),
    free(
        "--bad-lines",
        "what a line that is no document does: end the run, or be left out and listed in "
        "bad_lines.txt in --checkpoint-path",
        "error",
        choices=("error", "skip"),
    ),
    free(
        "--max-bad-share",
        "with --bad-lines skip: so many bad lines end the run, as a share of the lines read (at "
        "least of 1000)",
        0.01,
        real(at_most=1.0),
    ),
    unkept(
        "--preview-data",
        "print the first N blocks as text, trained text in green, and the mixture in numbers, and "
        "end; needs no weights and no other rank",
        None,
        whole(1),
        metavar="N",
    ),
    free(
        "--evaluation-data",
        "[name=]source,[name=]source,...: each a file, folder or task, as of --task-name, to "
        "measure the held-out loss on; without a name, a set has that of its file, folder or task",
        common=True,
        ranks="own",
    ),
    free(
        "--evaluation-steps",
        "evaluate every so many iterations; 0: only before the first and after the last",
        0,
        whole(0),
        common=True,
    ),
    free("--evaluation-num-batch", "batches of each set; default: all", None, whole(1)),
)
