"""The profile of a run (--profiling): the measured time of a step, compared with a simulation.

The simulator covers only the pipeline. To the simulated time, this module adds the gradient norms
and the update. No stage begins its update before all stages have computed their norms.
"""

import logging
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from arguments.settings import Settings
from comm.objects import gather_json
from comm.run_context import RunContext
from monitor.profiling.breakdown import SimulatedSpan
from monitor.profiling.profiler import TIMELINE_NAME, Profiler, start_profiling
from monitor.profiling.step_trace import RankSpan, StepOfAllRanks, compute_costs
from monitor.profiling.timeline import Timeline
from monitor.profiling.trace_file import TRACE_FOLDER
from monitor.profiling.tracer import NO_TRACER, Tracer, Track
from pipeline_parallel.schedule.schedules import SCHEDULES
from pipeline_parallel.schedule.simulator import Costs, SimulatedRun, StageCosts, simulate

logger = logging.getLogger(__name__)


def simulate_pipeline(
    steps: Sequence[StepOfAllRanks], *, schedule: str, num_stages: int, num_microbatches: int
) -> SimulatedRun:
    """Simulates the forward and backward of a step with the median times measured in `steps`.

    In the simulation, messages take no time.
    """
    spans = [span for step in steps for span in step.spans]
    found = compute_costs(spans, num_stages=num_stages)

    def seconds(stage: int, track: Track) -> float:
        return found.get((stage, track), 0.0)

    # If backward is not split, the track BACKWARD_COMPUTE has its complete time.
    costs = [
        StageCosts(
            forward=seconds(stage, Track.FORWARD_COMPUTE),
            input_gradient=seconds(stage, Track.BACKWARD_COMPUTE),
            weight_gradient=seconds(stage, Track.WEIGHT_GRADIENT),
        )
        for stage in range(num_stages)
    ]
    return simulate(SCHEDULES[schedule], num_stages, num_microbatches, Costs(costs))


def simulated_step(
    steps: Sequence[StepOfAllRanks], *, schedule: str, num_stages: int, num_microbatches: int
) -> float:
    """Returns the seconds that a step should take, according to the times measured in `steps`.

    Each stage computes the norms of its gradients after its last backward. The update begins when
    all stages have their norms.
    """
    simulation = simulate_pipeline(
        steps, schedule=schedule, num_stages=num_stages, num_microbatches=num_microbatches
    )
    norms, updates = _optimizer_seconds(steps, num_stages)
    ends = [max(s.end for s in simulation.actions if s.stage == i) for i in range(num_stages)]
    return max(end + norm for end, norm in zip(ends, norms, strict=True)) + max(updates)


class TrainingProfile:
    """The tracer of a rank, and the timeline that is drawn at the end of the run.

    Without --profiling tidy_profiling, nothing is traced, written or logged. The trace files are
    written under the working directory. Their names begin with the name of the checkpoint folder.
    """

    def __init__(self, settings: Settings, context: RunContext) -> None:
        self._control, self._topology = context.control, context.topology
        self._schedule = settings.parallel.pp_mode
        self._num_microbatches = settings.update.num_microbatches
        self._profiler: Profiler | None = None
        if settings.output.profiling == "tidy_profiling":
            name = settings.checkpoint.checkpoint_path.resolve().name
            self._profiler = start_profiling(self._control, run=name, cuda=context.is_cuda)
        self.tracer: Tracer = NO_TRACER if self._profiler is None else self._profiler.tracer

    def finish(self) -> None:
        """Writes the traces and timeline.png of a successful run; rank 0 logs a summary."""
        if self._profiler is None:
            return
        timeline = self._profiler.finish(
            partial(gather_json, self._control),
            self._simulated_spans,
            schedule=self._schedule,
            num_stages=self._topology.num_stages,
            num_replicas=self._topology.num_replicas,
            num_microbatches=self._num_microbatches,
        )
        if timeline is not None:
            logger.info("%s", self._summary(timeline))

    def close(self) -> None:
        """Writes the recorded trace; the run calls it after success and after failure."""
        self.tracer.close()

    def _simulated_spans(self, step: StepOfAllRanks) -> list[SimulatedSpan]:
        simulation = simulate_pipeline(
            [step],
            schedule=self._schedule,
            num_stages=self._topology.num_stages,
            num_microbatches=self._num_microbatches,
        )
        return [SimulatedSpan(s.stage, str(s.action), s.start, s.end) for s in simulation.actions]

    def _summary(self, timeline: Timeline) -> str:
        step, of_step = timeline.measured, timeline.measured_shares()
        simulated = simulated_step(
            [step],
            schedule=self._schedule,
            num_stages=self._topology.num_stages,
            num_microbatches=self._num_microbatches,
        )
        return (
            f"profile of step {step.step}: {1e3 * (step.end - step.start):.1f} ms, simulated "
            f"{1e3 * simulated:.1f} ms; bubble {of_step.bubble:.1%}, exposed communication "
            f"{of_step.communication:.1%}, compute {of_step.compute:.1%}: "
            f"{Path(TRACE_FOLDER, TIMELINE_NAME)}"
        )


def _optimizer_seconds(
    steps: Sequence[StepOfAllRanks], num_stages: int
) -> tuple[list[float], list[float]]:
    """Returns each stage's seconds for the gradient norms, and each stage's seconds for the update.

    Each number is a median over steps and replicas.
    """
    norms: list[list[float]] = [[] for _ in range(num_stages)]
    updates: list[list[float]] = [[] for _ in range(num_stages)]
    for step in steps:
        for rank in sorted({span.rank for span in step.spans}):
            first, *others = _optimizer_spans(step.spans, rank) or [0.0]
            norms[rank % num_stages].append(first)
            updates[rank % num_stages].append(sum(others))
    return [statistics.median(s) for s in norms], [statistics.median(s) for s in updates]


def _optimizer_spans(spans: Sequence[RankSpan], rank: int) -> list[float]:
    """Returns the seconds of a rank's optimizer spans: the gradient norms, then the update."""
    of_rank = (s for s in spans if s.rank == rank and s.track is Track.OPTIMIZER_COMP)
    return [s.end - s.start for s in sorted(of_rank, key=lambda span: span.start)]
