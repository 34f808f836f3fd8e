import io
import logging
import math
import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from monitor.console import Console
from monitor.logs import setup_logging
from monitor.metrics import HeldOut, IterationMetrics, SetLoss, StepWork
from monitor.progress import Progress, recent_average

CPU_WORK = StepWork(num_tokens=500, device_flops=2e10, peak_flops=None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def iteration(step: int, **changes: Any) -> IterationMetrics:
    values = {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "step_seconds": 0.5, **changes}
    return IterationMetrics(step=step, num_trained_tokens=400, **{"work": CPU_WORK, **values})


def run(stream: io.StringIO, *, steps: int, seconds: float) -> list[str]:
    clock = Mock(return_value=0.0)
    progress = Progress(steps, Console(stream), clock=clock)
    for step in range(1, steps + 1):
        clock.return_value += seconds
        progress.update(iteration(step))
    progress.close()
    return stream.getvalue().splitlines()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_plain_lines_come_every_ten_seconds_with_the_first_and_the_last() -> None:
    lines = run(io.StringIO(), steps=43, seconds=1.0)
    assert lines[0] == "step 1/43 | loss 2.5000 | lr 0.001 | 1,000 tokens/s | 21 s left"
    assert [int(re.findall(r"\d+", line)[0]) for line in lines] == [1, 11, 21, 31, 41, 43]


@pytest.mark.parametrize(
    ("tflops", "peak", "words"),
    [
        (123.44, 312.0, "21 s left | 123.4 TFLOP/s, MFU 40%"),
        (0.2, 8.1, "21 s left | 0.2 TFLOP/s, MFU 2%"),
        (123.44, None, "21 s left | 123.4 TFLOP/s"),
        (0.2, None, "21 s left"),  # a CPU
    ],
)
def test_the_speed_of_a_device_is_shown_if_it_is_worth_a_look(
    tflops: float, peak: float | None, words: str, stream: io.StringIO
) -> None:
    flops = None if peak is None else peak * 1e12
    work = StepWork(num_tokens=500, device_flops=tflops * 1e12 / 2, peak_flops=flops)
    Progress(43, Console(stream)).update(iteration(1, work=work))
    assert stream.getvalue() == f"step 1/43 | loss 2.5000 | lr 0.001 | 1,000 tokens/s | {words}\n"


def test_slow_iterations_each_have_a_plain_line() -> None:
    assert len(run(io.StringIO(), steps=5, seconds=12.0)) == 5


def test_a_terminal_has_one_line_rewritten_in_place() -> None:
    stream = Terminal()
    run(stream, steps=20, seconds=1.0)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r\x1b[2K") == 20
    assert all(len(state) < 80 for state in stream.getvalue().split("\r\x1b[2K"))


def test_evaluations_always_have_a_line(stream: io.StringIO) -> None:
    progress = Progress(100, Console(stream), clock=lambda: 0.0)
    progress.show_evaluation(0, HeldOut(7.0))
    for step in range(1, 4):
        progress.update(iteration(step, held_out=HeldOut(2.0) if step == 3 else None))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 0: held-out loss 7.0000, perplexity 1097"
    assert lines[1].endswith("| held-out 7.0000")
    assert lines[2:] == ["step 3: held-out loss 2.0000, perplexity 7.389"]


def test_each_set_of_an_evaluation_is_named(stream: io.StringIO) -> None:
    progress = Progress(100, Console(stream), clock=lambda: 0.0)
    sets = {"wiki": SetLoss(2.0, 10), "chat": SetLoss(math.nan, 3)}
    progress.show_evaluation(0, HeldOut(math.nan, sets))
    assert stream.getvalue() == (
        "step 0: held-out loss nan, perplexity nan; wiki: loss 2.0000, perplexity 7.389; "
        "chat: loss nan, perplexity nan\n"
    )


def test_the_last_learning_rate_stands_where_no_update_ended(stream: io.StringIO) -> None:
    progress = Progress(2, Console(stream), clock=lambda: 0.0)
    progress.update(iteration(1))
    progress.update(iteration(2, lr=None))
    assert "lr 0.001" in stream.getvalue().splitlines()[1]


def test_log_records_scroll_above_the_live_line() -> None:
    stream = Terminal()
    progress = Progress(3, setup_logging(0, stream))
    progress.update(iteration(1))
    stream.seek(0)
    stream.truncate()
    logging.getLogger("checkpoint").info("saved")
    assert re.fullmatch(r"\r\x1b\[2Ksaved\nstep 1/3 \| .*", stream.getvalue())


def test_other_ranks_speak_only_when_something_is_wrong(stream: io.StringIO) -> None:
    setup_logging(3, stream)
    logging.info("fine")
    logging.warning("rank 1 is lost")
    assert stream.getvalue() == "rank 3: rank 1 is lost\n"


def test_rank_0_tells_its_story_but_not_that_of_libraries(stream: io.StringIO) -> None:
    setup_logging(0, stream)
    logging.info("step 1")
    logging.getLogger("httpx").info("GET")
    assert stream.getvalue() == "step 1\n"


def test_a_stream_that_is_gone_ends_no_training(stream: io.StringIO) -> None:
    console = Console(stream)
    stream.close()
    console.print("into the void")


def test_the_time_left_forgives_one_long_iteration() -> None:
    assert recent_average([60.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == 1.0
    assert recent_average([1.0, 3.0]) == 2.0
