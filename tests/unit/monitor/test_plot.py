import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from monitor.plot import draw_loss, held_out_curves, restarts, smooth

PNG = b"\x89PNG"
LONG = "a $ and a name that is much too long to be shown"
CASES: dict[str, list[dict[str, Any]]] = {
    "one point": [{"step": 1, "loss": 3.0, "lr": 1e-3}],
    "nothing but nulls": [{"step": 1, "loss": None, "lr": None}],
    "a learning rate of zero": [{"step": step, "loss": 3.0, "lr": 0.0} for step in range(1, 4)],
    "everything": [
        {"step": 1, "loss": 5.0, "lr": None, "eval_loss_before": 6.0},
        *({"step": step, "loss": 5 / step, "lr": 1e-3} for step in range(2, 30)),
        {"step": 30, "loss": 0.1, "lr": 0.0, "eval_loss": 0.2, "resumed": True},
    ],
    "sets that came later": [
        {"step": step, "loss": 5.0, "lr": 0.1, **more}
        for step, more in (
            (1, {"eval_loss_before": 6.0, "eval_loss": 5.0}),
            (2, {"eval_loss": 3.0, "eval_sets": {"wiki": {"loss": 4.0}, LONG: {"loss": 2.0}}}),
            (3, {"eval_loss": None, "eval_sets": {"wiki": {"loss": 3.0}, LONG: {"loss": None}}}),
        )
    ],
}


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("lines", CASES.values(), ids=CASES.keys())
def test_draws(tmp_path: Path, lines: list[dict[str, Any]], caplog: Any) -> None:
    picture = tmp_path / "loss.png"
    draw_loss(write_metrics(tmp_path, lines), picture)
    assert caplog.text == ""
    assert picture.read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_failure_is_a_warning(tmp_path: Path, caplog: Any) -> None:
    metrics = write_metrics(tmp_path, [{"step": 1, "loss": "high"}])
    draw_loss(metrics, tmp_path / "no such folder" / "loss.png")
    assert "no such folder" in caplog.text


def test_no_metrics_no_picture(tmp_path: Path) -> None:
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_the_points() -> None:
    assert held_out_curves(CASES["everything"]) == {"": [(0, 6.0), (30, 0.2)]}
    assert held_out_curves(CASES["sets that came later"]) == {
        "": [(0, 6.0), (1, 5.0)],
        "wiki": [(2, 4.0), (3, 3.0)],
        LONG: [(2, 2.0)],
    }
    assert restarts(CASES["everything"]) == [30]


def test_each_set_has_a_line_and_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure  # this import takes a while

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_loss(write_metrics(tmp_path, CASES["sets that came later"]), tmp_path / "loss.png")
    (figure,) = drawn
    entries = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    assert entries == [
        ["training loss", "held-out loss, last 5.000", "learning rate"],
        ["3.000 wiki", r"2.000 a \$ and a name that…"],
    ]
    curves = [line.get_ydata().tolist() for line in figure.axes[0].get_lines()]
    assert curves == [[5.0] * 3, [6.0, 5.0], [4.0, 3.0], [2.0]]


def test_smoothing_keeps_a_constant_and_calms_the_rest() -> None:
    assert smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    assert smooth([0.0, 3.0, 0.0]) == [1.5, 1.0, 1.5]
    assert smooth([]) == []


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, monitor.plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
