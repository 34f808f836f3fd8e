"""The memory of all stages of a plan with the modes of --recompute; auto chooses one of them."""

from functools import cached_property

import torch

from arguments.settings import Settings
from common.text import format_bytes, format_table
from modules.layers.selective import MODES
from planning.memory.auto_recompute import Choice, Need, choose_mode, fullest
from planning.memory.device_memory import device_memory
from planning.memory.dry_run import DryRun, PlannedModel
from planning.memory.stage_memory import StageMemory


class PlannedModes:
    """The planned stages by mode; the dry run of a stage is made when it is first needed.

    --recompute auto chooses by --device-memory. Without it, a plan for CPUs uses the memory of this
    machine, as if all ranks ran here, and a plan for GPUs uses the memory of this machine's GPU. If
    there is no GPU, the plan is for --recompute false.
    """

    def __init__(self, settings: Settings, model: PlannedModel, *, cuda: bool) -> None:
        self._settings, self._model, self._cuda = settings, model, cuda
        self._planned: dict[tuple[str, int], StageMemory] = {}

    @cached_property
    def choice(self) -> Choice:
        """The mode of the plan."""
        flag = self._settings.precision.recompute
        if flag != "auto":
            return Choice(flag, "as --recompute requests")
        if self._room is None:
            return Choice("false", "because only --device-memory SIZE tells the memory of GPUs")
        return choose_mode(self._needs)

    @property
    def settings(self) -> Settings:
        """Returns the settings with the chosen mode."""
        return self._settings.changed(recompute=self.choice.value)

    @property
    def stages(self) -> list[StageMemory]:
        """Returns the memory of each stage with the chosen mode."""
        return self._stages(self.choice.value)

    def table(self) -> str:
        """Returns a table with the peak of the fullest stage for each mode, and the choice.

        For modes slower than the chosen one, it is the stage that is fullest with the chosen mode.
        """
        chosen = list(MODES).index(self.choice.value)
        needs = [fullest(self._needs(value)) for value in list(MODES)[: chosen + 1]]
        for value in list(MODES)[chosen + 1 :]:
            stage = needs[-1].stage
            needs.append(Need(stage, self._of_stage(value, stage).peak, needs[-1].room))
        columns = [
            ["recompute", *MODES],
            ["fullest stage", *(str(need.stage) for need in needs)],
            ["peak", *(format_bytes(need.peak) for need in needs)],
        ]
        if self._room is not None:
            fits = ("yes" if need.peak <= need.room else "NO" for need in needs)
            columns.append([f"fits {format_bytes(self._room)}", *fits])
        table = format_table(zip(*columns, strict=True), justify=str.rjust)
        return f"{table}\nrecompute: {self.choice.value}, {self.choice.reason}{self._source()}\n"

    @cached_property
    def _room(self) -> int | None:
        parallel, size = self._settings.parallel, self._settings.output.device_memory
        if size is not None:
            return size
        if not self._cuda:
            return device_memory(torch.device("cpu"), ranks_here=parallel.world_size)
        if torch.cuda.is_available():
            return device_memory(torch.device("cuda", parallel.cuda_id), ranks_here=1)
        return None

    def _source(self) -> str:
        """Returns where the memory comes from."""
        if self._room is None or self._settings.output.device_memory is not None:
            return ""
        if self._cuda:
            return " (nine tenths of this machine's GPU)"
        ranks = self._settings.parallel.world_size
        return f" (this machine's memory for tensors of each of {ranks} ranks)"

    def _needs(self, value: str) -> list[Need]:
        planned = enumerate(self._stages(value))
        return [Need(number, stage.peak, self._room or 0) for number, stage in planned]

    def _stages(self, value: str) -> list[StageMemory]:
        num_stages = self._settings.parallel.pipeline_group_size
        return [self._of_stage(value, stage) for stage in range(num_stages)]

    def _of_stage(self, value: str, stage: int) -> StageMemory:
        if (value, stage) not in self._planned:
            settings = self._settings.changed(recompute=value)
            dry_run = DryRun(settings, self._model, cuda=self._cuda)
            self._planned[value, stage] = dry_run.of_rank(stage)
        return self._planned[value, stage]
