"""The plot loss.png, drawn from metrics.jsonl: losses, learning rate and restarts.

The plot uses matplotlib's objects and not pyplot, because pyplot has global state and chooses a
window system. matplotlib is imported only when a picture is drawn.
"""

import io
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import replace_file
from monitor.metrics import read_metrics

logger = logging.getLogger(__name__)

_RAW, _SMOOTH, _HELD_OUT, _LR, _RESTART = "#b5cde6", "#1f5fa8", "#d1495b", "#3f8f4f", "#999999"
_SETS = (_HELD_OUT, "#e39a2d", "#7b4fa3", "#2a9d9d", "#8c5a3c", "#d16ba5")
_MARKERS = "osD^vP"  # each set has its own colour and marker
_LONGEST_NAME = 20  # characters of a set's name in the legend

Points = list[tuple[int, float]]  # (step, value)


def draw_loss(metrics_path: Path, png_path: Path) -> None:
    """Draws the metrics and replaces the previous picture; a failure only logs a warning."""
    try:
        lines = read_metrics(metrics_path)
        if lines:
            replace_file(png_path, _render(lines))
    except Exception as error:  # training continues after any failure of matplotlib
        logger.warning("cannot draw %s: %s", png_path, error)


def held_out_curves(lines: Iterable[dict[str, Any]]) -> dict[str, Points]:
    """Returns the held-out losses of each set; the keys are the sets' names, or "" for no name.

    The evaluation before the first iteration has step 0.
    """
    curves: dict[str, Points] = {}
    for line in lines:
        for suffix, step in (("_before", line["step"] - 1), ("", line["step"])):
            unnamed = {"": {"loss": line.get(f"eval_loss{suffix}")}}
            for name, result in line.get(f"eval_sets{suffix}", unnamed).items():
                if result["loss"] is not None:
                    curves.setdefault(name, []).append((step, result["loss"]))
    return curves


def restarts(lines: Iterable[dict[str, Any]]) -> list[int]:
    """Returns the first step after each resume."""
    return [line["step"] for line in lines if line.get("resumed")]


def smooth(values: Sequence[float]) -> list[float]:
    """Returns a running mean over a twentieth of the values, with a shorter window at both ends.

    The window is centred, so that the mean does not lag behind a falling loss.
    """
    reach = max(1, len(values) // 40)
    sums = list(itertools.accumulate(values, initial=0.0))
    result = []
    for index in range(len(values)):
        low, high = max(0, index - reach), min(len(values), index + reach + 1)
        result.append((sums[high] - sums[low]) / (high - low))
    return result


def _points(lines: Iterable[dict[str, Any]], key: str) -> Points:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _render(lines: Sequence[dict[str, Any]]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = held_out_curves(lines)
    width = 11.5 if any(curves) else 9  # the legend of the sets is beside the axes
    figure = Figure(figsize=(width, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    handles = [
        *_draw_training(axes, _points(lines, "loss")),
        *_draw_held_out(axes, curves.get("", [])),
        *_draw_lr(axes.twinx(), _points(lines, "lr")),
        *_draw_restarts(axes, restarts(lines)),
    ]
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#eeeeee")
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    if sets := _draw_sets(axes, {name: points for name, points in curves.items() if name}):
        title = "held-out loss, last"
        figure.legend(handles=sets, title=title, loc="outside right center", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")  # a bare Figure renders with Agg
    return picture.getvalue()


def _draw_training(axes: Any, points: Points) -> list[Any]:
    if len(points) < 10:
        return _draw(axes, points, color=_SMOOTH, linewidth=1.8, label="training loss")
    raw = _draw(axes, points, color=_RAW, linewidth=0.9, label="training loss")
    steps, losses = zip(*points, strict=True)
    smoothed = list(zip(steps, smooth(losses), strict=True))
    return raw + _draw(axes, smoothed, color=_SMOOTH, linewidth=1.8, label="smoothed")


def _draw_held_out(axes: Any, points: Points) -> list[Any]:
    label = f"held-out loss, last {points[-1][1]:.3f}" if points else ""
    return _draw(axes, points, color=_HELD_OUT, marker="o", markersize=5, label=label)


def _draw_sets(axes: Any, curves: Mapping[str, Points]) -> list[Any]:
    handles = []
    looks = itertools.cycle(zip(_SETS, _MARKERS, strict=True))
    for (name, points), (color, marker) in zip(curves.items(), looks, strict=False):
        label = f"{points[-1][1]:.3f} {_short(name)}"
        handles += _draw(axes, points, color=color, marker=marker, markersize=5, label=label)
    return handles


def _short(name: str) -> str:
    """Returns a set's name for the legend: cut if long, and with $ escaped ($ starts a formula)."""
    cut = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return cut.replace("$", r"\$")


def _draw_lr(axes: Any, points: Points) -> list[Any]:
    if not points:
        axes.set_axis_off()
        return []
    axes.set_ylabel("learning rate", color=_LR)
    axes.tick_params(axis="y", colors=_LR)
    axes.set_ylim(0, 1.08 * max(rate for _, rate in points) or 1.0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return _draw(axes, points, color=_LR, linewidth=1.2, alpha=0.7, label="learning rate")


def _draw(axes: Any, points: Points, **style: Any) -> list[Any]:
    if not points:
        return []
    if len(points) == 1:  # a line through one point is invisible
        style.setdefault("marker", "o")
    steps, values = zip(*points, strict=True)
    return list(axes.plot(steps, values, **style))


def _draw_restarts(axes: Any, steps: Sequence[int]) -> list[Any]:
    style = {"color": _RESTART, "linewidth": 1.0, "linestyle": "--", "label": "restart"}
    lines = [axes.axvline(step - 0.5, **style) for step in steps]
    return lines[:1]  # one entry in the legend for all restarts
