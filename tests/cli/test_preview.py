"""Tests that --preview-data shows the blocks that a run trains, and counts the data correctly."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dist_clm_train import main
from tasks import preview
from tasks.mixture import BlockStream, Pack
from tasks.open import open_source
from tasks.preview import (
    GREEN,
    GREY,
    PLAIN,
    SourceSample,
    describe_mixture,
    preview_blocks,
    sample_source,
)
from tasks.shuffling.shuffle import shuffle_source
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tasks.tokenization import prefetch
from tasks.tokenization.encoder import Encoder, TrainOn
from tests.support.data import make_texts, tokenizer, write_jsonl

PAIRS = [{"prompt": f"fox {i}:", "completion": " dog"} for i in range(10)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits the prefetcher to batches of 16 documents; 1024 would repeat small sources often."""
    monkeypatch.setattr(prefetch, "BATCH_DOCUMENTS", 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    write_jsonl(tmp_path / "text.jsonl.zst", make_texts(30, seed=1))
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def run(folder: Path, capsys: pytest.CaptureFixture[str], more: str = "") -> str:
    main(
        f"--model-name no/such/model --model-type gptneox --num-layers 2 --embedding-dim 32 "
        f"--tokenizer-name {folder}/tokenizer --seq-length 16 --batch-size 4 --total-steps 10 "
        f"--task-name {folder}/pairs.jsonl:1,{folder}/text.jsonl.zst:3 --preview-data 3 "
        f"{more}".split()
    )
    return capsys.readouterr().out


def open_stream(path: Path, **options: Any) -> BlockStream:
    options = {"seq_len": 16, "seed": 1, **options}
    return open_training_stream([SourceSpec(str(path))], tokenizer(), **options)


def sample(path: Path, *, train_on: TrainOn = "all", **options: Any) -> SourceSample:
    documents = shuffle_source(open_source(str(path)), seed=1)
    return sample_source(documents, Encoder(tokenizer(), train_on=train_on), seq_len=16, **options)


def test_the_blocks_are_those_of_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The preview needs no model; it shows text and origins of the blocks that a run trains."""
    out = run(folder, capsys)
    sources = {"pairs.jsonl": 1, "text.jsonl.zst": 3}
    specs = [SourceSpec(str(folder / name), weight) for name, weight in sources.items()]
    stream = open_training_stream(specs, tokenizer(), seq_len=16, seed=42)
    for number in range(1, 4):
        block = stream.next_block()
        first = tokenizer().decode(block.token_ids[:1])
        rest = tokenizer().decode(block.token_ids[1:])
        assert f"block {number}: 16 tokens, 15 trained; from {', '.join(block.documents)}\n" in out
        assert f"[-{first}-]{rest}\n" in out


def test_what_is_not_trained_is_marked(folder: Path) -> None:
    stream = open_stream(folder / "pairs.jsonl", seq_len=64, train_on="completion")
    state = stream.state()
    _, plain = preview_blocks(stream, tokenizer(), 1, colour=False)
    assert re.match(r"\[-fox \d:-\] dog<eos>\[-fox \d:-\] dog<eos>", plain)
    stream.restore(state)
    _, colour = preview_blocks(stream, tokenizer(), 1, colour=True)
    assert f"{GREEN} dog<eos>{PLAIN}{GREY}fox" in colour
    for mark in (GREEN, GREY, PLAIN):
        colour = colour.replace(mark, "")
    assert colour == plain.replace("[-", "").replace("-]", "")


def test_text_does_not_command_the_terminal(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["fox\x1b[90m\r\x07\x9b\tdog\né"])
    for colour in (False, True):
        blocks = preview_blocks(open_stream(path, seq_len=64), tokenizer(), 1, colour=colour)
        text = list(blocks)[1]
        assert "\\x1b[90m\\r\\x07\\x9b\tdog\né<eos>" in text
        controls = {char for char in text if ord(char) < 32 or 127 <= ord(char) < 160}
        assert controls == {"\t", "\n"} | ({"\x1b"} if colour else set())


def test_the_mixture_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table counts each source's tokens; 25% of a run's 640 tokens come from pairs.jsonl."""
    lines = run(folder, capsys, "--train-on completion").splitlines()
    heading, pairs, text = lines[-3:]
    assert heading.split() == ["share", "documents", "tokens", "trained", "epochs", "source"]
    answer = len(tokenizer()(" dog")["input_ids"]) + 1
    tokens = sum(
        len(tokenizer()(pair["prompt"] + pair["completion"])["input_ids"]) + 1 for pair in PAIRS
    )
    epochs = f"{0.25 * 640 / tokens:.2f}"
    assert pairs.split()[:5] == ["25.0%", "10", str(tokens), str(10 * answer), epochs]
    share, documents, all_tokens, trained, _, name = text.split()
    assert (share, documents, name) == ("75.0%", "30", str(folder / "text.jsonl.zst"))
    assert all_tokens == trained


def test_a_sample_is_told_from_the_whole() -> None:
    rest: dict[str, Any] = {"num_trained_tokens": 50, "num_blocks": 10, "is_complete": False}
    numbers = [
        SourceSample("a", 10, 100, **rest, num_rows=1000),
        SourceSample("b", 10, 100, **rest, num_rows=500, has_more_rows=True),
    ]
    _, first, second = describe_mixture(numbers, [0.5, 0.5], run_blocks=4000).splitlines()
    assert first.split() == ["50.0%", "~1,000", "~10,000", "~5,000", "~2.00", "a"]
    assert second.split() == ["50.0%", ">500", ">5,000", ">2,500", "<4.00", "b"]


def test_what_is_read_in_order_is_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.zst", ["fox dog"] * 70)
    for seconds, num_rows, has_more in ((10.0, 70, False), (-1.0, 1, True)):
        numbers = sample(path, max_documents=20, count_seconds=seconds)
        found = numbers.num_documents, numbers.num_rows, numbers.has_more_rows
        assert found == (20, num_rows, has_more)


def test_padding_is_counted_in_the_epochs(tmp_path: Path) -> None:
    """A block of 16 tokens has room for one document of 9, so 80 blocks hold 40 documents twice."""
    path = write_jsonl(tmp_path / "a.jsonl", [" fox" * 8] * 40)
    numbers = sample(path, pack="document")
    assert numbers.num_tokens == 40 * 9
    row = describe_mixture([numbers], [1.0], run_blocks=80).splitlines()[1]
    assert row.split()[4] == "2.00"
    stream = open_stream(path, pack="document")
    heading, text = preview_blocks(stream, tokenizer(), 1, colour=False)
    assert heading.startswith("block 1: 16 tokens, 8 trained, 7 of padding; from ")
    assert text.count("<eos>") == 1


@pytest.mark.parametrize("pack", ["concat", "document"])
@pytest.mark.parametrize("rows", [1, 40])
def test_epochs_are_those_that_a_run_makes(tmp_path: Path, pack: Pack, rows: int) -> None:
    """The epochs in the preview are the epochs of a real stream after 1000 blocks.

    Most blocks of long prompts have no trained token and are skipped. If the file has only one row,
    all blocks repeat the same document.
    """
    pairs = [{"prompt": "fox " * (i % 7 * 20), "completion": " dog" * 3} for i in range(rows)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    stream = open_stream(path, train_on="completion", pack=pack)
    blocks = 1000
    for _ in range(blocks):
        stream.next_block()
    (source,) = stream.state()["sources"]
    read = source["documents"]["epoch"] * rows + source["documents"]["position"]
    numbers = sample(path, train_on="completion", pack=pack)
    told = describe_mixture([numbers], [1.0], run_blocks=blocks).splitlines()[1].split()[4]
    assert float(told) == pytest.approx(read / rows, rel=0.03)


def test_a_sample_of_huge_documents_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "SAMPLE_TOKENS", 100)
    path = write_jsonl(tmp_path / "a.jsonl", [" fox" * 39] * 10)
    numbers = sample(path)
    assert (numbers.num_documents, numbers.num_tokens, numbers.is_complete) == (3, 120, False)


def test_a_mistake_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as caught:
        run(folder, capsys)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pairs.jsonl:1: the object has no" in line


def test_other_ranks_print_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "--rank 1 --world-size 2 --pipeline-group-size 2 --dist-url tcp://127.0.0.1:1"
    assert run(folder, capsys, more) == ""
