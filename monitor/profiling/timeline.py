"""The picture timeline.png: a measured step of all ranks, and below it the simulated step.

As in monitor.plot, matplotlib is used without pyplot and imported only when a picture is drawn.
"""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.files import replace_file
from monitor.profiling.breakdown import (
    Interval,
    RankBreakdown,
    Shares,
    SimulatedSpan,
    breakdown_by_rank,
    shares,
    simulated_spans,
)
from monitor.profiling.step_trace import StepOfAllRanks
from monitor.profiling.tracer import PIPELINE_WORK, Track

logger = logging.getLogger(__name__)

_DPI, _NARROW, _WIDE = 100, 14.0, 28.0  # inches: 1400 to 2800 px
_BOX = 0.2  # inches of an average box, for two digits
_ROW, _PANEL, _FRAME = 0.5, 0.62, 1.05  # inches of a row, of a panel's title and axis, of the rest
_FONTS = (9, 7)  # font sizes of the number in a box; the first size that fits is used
_DIGIT, _PADDING = 0.85, 2.0  # width of a digit in pixels per point; margin of a box in pixels

_BUBBLE, _COMMUNICATION = "#e4e4e4", "#c1121f"


class _Style(NamedTuple):
    label: str
    colour: str
    text: str


_STYLES = {
    Track.FORWARD_COMPUTE: _Style("forward", "#2f6db3", "white"),
    Track.BACKWARD_COMPUTE: _Style("backward", "#7cc48a", "black"),
    Track.WEIGHT_GRADIENT: _Style("weight gradient", "#f4c152", "black"),
    Track.OPTIMIZER_COMP: _Style("optimizer", "#8b62ad", "white"),
}


@dataclass(frozen=True)
class Timeline:
    """A measured step and its simulation, whose time 0 is the start of the step's first forward."""

    measured: StepOfAllRanks
    simulated: Sequence[SimulatedSpan]
    schedule: str
    num_stages: int
    num_replicas: int
    num_microbatches: int

    def measured_breakdown(self) -> list[RankBreakdown]:
        num_ranks = self.num_stages * self.num_replicas
        return breakdown_by_rank(
            self.measured.spans, num_stages=self.num_stages, num_ranks=num_ranks
        )

    def simulated_breakdown(self) -> list[RankBreakdown]:
        spans = simulated_spans(self.simulated)
        return breakdown_by_rank(spans, num_stages=self.num_stages, num_ranks=self.num_stages)

    def measured_shares(self) -> Shares:
        """Returns the shares of work, communication and bubble in the complete measured step."""
        step = self.measured
        return shares(self.measured_breakdown(), start=step.start, end=step.end)

    def simulated_shares(self) -> Shares:
        """Returns the shares of work, communication and bubble in the complete simulation."""
        return shares(self.simulated_breakdown(), start=0.0, end=self.simulated_seconds)

    @property
    def simulated_seconds(self) -> float:
        return max((span.end for span in self.simulated), default=0.0)

    @property
    def pipeline_start(self) -> float:
        """The start of the measured step's first forward, in seconds since the run began."""
        return min(
            (span.start for span in self.measured.spans if span.track in PIPELINE_WORK),
            default=self.measured.start,
        )

    @property
    def pipeline_seconds(self) -> float:
        """The measured seconds from the start of the first forward to the end of the last backward.

        The simulation covers the same part of a step.
        """
        start = self.pipeline_start
        ends = (span.end for span in self.measured.spans if span.track in PIPELINE_WORK)
        return max(ends, default=start) - start

    @property
    def drawn_seconds(self) -> float:
        """Seconds from the start of the step to the end of the picture.

        The picture ends with the step or with the simulation, whichever ends later.
        """
        simulated = self.pipeline_start - self.measured.start + self.simulated_seconds
        return max(self.measured.end - self.measured.start, simulated)


def draw_timeline(timeline: Timeline, path: Path) -> None:
    """Draws the timeline and replaces the previous picture; a failure only logs a warning."""
    try:
        picture = io.BytesIO()
        timeline_figure(timeline).savefig(picture, format="png")
        replace_file(path, picture.getvalue())
    except Exception as error:  # a failure of matplotlib must not fail the run
        logger.warning("cannot draw %s: %s", path, error)


def timeline_figure(timeline: Timeline) -> Any:
    """Returns a matplotlib Figure with a panel for the measured step and one for the simulation."""
    from matplotlib.figure import Figure

    num_ranks = timeline.num_stages * timeline.num_replicas
    heights = [num_ranks] + [timeline.num_stages] * bool(timeline.simulated)
    inches = _FRAME + sum(_PANEL + _ROW * rows for rows in heights)
    figure = Figure(figsize=(_width(timeline), inches), dpi=_DPI, layout="constrained")
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    panels[0].set_xlim(0.0, 1e3 * timeline.drawn_seconds)
    _draw_measured(panels[0], timeline)
    if timeline.simulated:
        _draw_simulated(panels[1], timeline)
    panels[-1].set_xlabel("milliseconds since the step began")
    figure.suptitle(_title(timeline), fontsize=14, fontweight="bold")
    _draw_legend(figure, timeline)
    return figure


def _width(timeline: Timeline) -> float:
    """Returns a figure width in inches at which most boxes have space for a number."""
    boxes = max((len(rank.work) for rank in timeline.measured_breakdown()), default=0)
    return min(max(_NARROW, _BOX * boxes), _WIDE)


def _title(timeline: Timeline) -> str:
    replicas = timeline.num_replicas
    return (
        f"{timeline.schedule}, {timeline.num_stages} stages x {replicas} "
        f"replica{'s' * (replicas > 1)}, {timeline.num_microbatches} microbatches: "
        f"step {timeline.measured.step}"
    )


def _draw_measured(axes: Any, timeline: Timeline) -> None:
    step = timeline.measured
    is_single = timeline.num_replicas == 1
    names = [
        f"stage {rank}" if is_single else f"rank {rank}: stage {rank % timeline.num_stages}"
        for rank in range(timeline.num_stages * timeline.num_replicas)
    ]
    length = f"{_ms(step.end - step.start)}, of which pipeline {_ms(timeline.pipeline_seconds)}"
    _title_panel(axes, f"measured: {length}", timeline.measured_shares())
    bounds = (step.start, step.end)
    _draw_rows(axes, timeline.measured_breakdown(), names, bounds=bounds, shift=-step.start)


def _draw_simulated(axes: Any, timeline: Timeline) -> None:
    seconds = timeline.simulated_seconds
    ratio = timeline.pipeline_seconds / seconds
    length = f"{_ms(seconds)}; measured pipeline {ratio:.3f} x as long"
    _title_panel(axes, f"simulated pipeline: {length}", timeline.simulated_shares())
    names = [f"stage {stage}" for stage in range(timeline.num_stages)]
    shift = timeline.pipeline_start - timeline.measured.start
    _draw_rows(axes, timeline.simulated_breakdown(), names, bounds=(0.0, seconds), shift=shift)


def _title_panel(axes: Any, left: str, of_panel: Shares) -> None:
    axes.set_title(left, loc="left", fontsize=11)
    text = (
        f"compute {of_panel.compute:.1%}    "
        f"exposed communication {of_panel.communication:.1%}    bubble {of_panel.bubble:.1%}"
    )
    axes.set_title(text, loc="right", fontsize=11, fontweight="bold")


def _draw_rows(
    axes: Any,
    breakdowns: Sequence[RankBreakdown],
    names: Sequence[str],
    *,
    bounds: Interval,
    shift: float,
) -> None:
    """Draws a row for each rank, the first row at the top; adds `shift` seconds to all times."""
    axes.set_ylim(len(breakdowns) - 0.5, -0.5)
    axes.set_yticks(range(len(breakdowns)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for row, rank in enumerate(breakdowns):
        _box(axes, row, bounds[0] + shift, bounds[1] + shift, _BUBBLE)
        for start, end in rank.communication:
            _box(axes, row, start + shift, end + shift, _COMMUNICATION)
        for span in rank.work:
            style = _STYLES[span.track]
            _box(axes, row, span.start + shift, span.end + shift, style.colour, edge=True)
            _number(axes, row, span.start + shift, span.end + shift, span.microbatch, style)


def _box(axes: Any, row: int, start: float, end: float, colour: str, *, edge: bool = False) -> None:
    from matplotlib.patches import Rectangle

    style = {"edgecolor": "white", "linewidth": 0.6} if edge else {"linewidth": 0.0}
    axes.add_patch(
        Rectangle((1e3 * start, row - 0.4), 1e3 * (end - start), 0.8, facecolor=colour, **style)
    )


def _number(
    axes: Any, row: int, start: float, end: float, microbatch: int | None, style: _Style
) -> None:
    """Draws the number of the microbatch in its box, if the number fits."""
    left, right = axes.get_xlim()
    width = axes.figure.get_figwidth() * _DPI * 0.9  # the axes take 0.9 of the width
    pixels = 1e3 * (end - start) / (right - left) * width
    text = "" if microbatch is None else str(microbatch)
    fitting = (size for size in _FONTS if len(text) * _DIGIT * size + _PADDING < pixels)
    size = next(fitting, None)
    if text and size is not None:
        place = {"ha": "center", "va": "center_baseline", "clip_on": True}
        axes.text(5e2 * (start + end), row, text, color=style.text, fontsize=size, **place)


def _draw_legend(figure: Any, timeline: Timeline) -> None:
    from matplotlib.patches import Patch

    tracks = {span.track for span in timeline.measured.spans}
    labels = {style.colour: style.label for track, style in _STYLES.items() if track in tracks}
    if {Track.WEIGHT_GRADIENT, Track.BACKWARD_COMPUTE} <= tracks:
        labels[_STYLES[Track.BACKWARD_COMPUTE].colour] = "backward, or its input gradient"
    labels[_COMMUNICATION] = "exposed communication"
    labels[_BUBBLE] = "bubble: idle, or waiting for another stage"
    handles = [Patch(color=colour, label=label) for colour, label in labels.items()]
    place = {"loc": "outside lower center", "ncols": len(handles)}
    figure.legend(handles=handles, frameon=False, fontsize=11, **place)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
