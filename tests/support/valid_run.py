"""Folder with models and data, and valid flags; the tests of bad input change the flags."""

from pathlib import Path
from typing import Any

from tests.support.cases import to_argv
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.models import make_shards

ROOT = Path(__file__).parents[2]
LAYERS, VOCAB = 3, 400
Flags = dict[str, Any]


def make_home(folder: Path) -> Path:
    """Makes a folder with layer shards (GPT-NeoX in m, GPT-J in j), and with good and bad data."""
    for name, family, layers in (("m", "gptneox", "num_hidden_layers"), ("j", "gptj", "n_layer")):
        make_shards(folder, name, family, {layers: LAYERS}, place="")
    write_jsonl(folder / "data.jsonl", make_texts(60, seed=1))
    good = '{"text": "the"}\n'
    (folder / "broken.jsonl").write_text(good * 4200 + '{"Text": "no"}\n')
    (folder / "broken-at-once.jsonl").write_text("nonsense\n")
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    return folder


def right(home: Path) -> Flags:
    """Returns valid flags."""
    return flags_of(f"""
        --model-name {home}/m --model-type gptneox --num-layers 2 --embedding-dim 32
        --task-name {home}/data.jsonl --seq-length 24 --batch-size 2 --total-steps 2
        --world-size 4 --rank 0 --pipeline-group-size 2 --data-group-size 2 --join-timeout 60
        --dist-timeout 60 --checkpoint-path {home}/runs/unused
    """)


def argv(flags: Flags) -> list[str]:
    """Returns a command line without the flags whose value is None."""
    return to_argv({flag: value for flag, value in flags.items() if value is not None})


def the_line(stderr: str) -> str:
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    assert len(stderr) < 600, stderr
    return stderr.rstrip("\n")


def at(home: Path, value: Any) -> Any:
    return value.replace("{home}", str(home)) if isinstance(value, str) else value
