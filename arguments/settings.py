"""The settings of a run: frozen groups, made once from the command line.

A field has the name of its flag; `arguments.flag_table` says what the flags mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pipeline_parallel.partition.split import Asked
from tasks.source_spec import SourceSpec


@dataclass(frozen=True)
class ModelSettings:
    """The model and how its layers are cut into stages."""

    model_name: Path
    tokenizer_name: str
    model_type: str
    num_layers: Asked
    embedding_dim: int
    load_pretrained_model: bool


@dataclass(frozen=True)
class ParallelSettings:
    """The processes, and how they share a model and its batch."""

    world_size: int
    rank: int
    pipeline_group_size: int
    data_group_size: int
    pp_mode: str
    dp_mode: str
    zero_stage: int
    use_cuda: bool | None
    cuda_id: int
    dist_backend: str | None
    dp_backend: str | None


@dataclass(frozen=True)
class NetworkSettings:
    """How the ranks meet.

    `start_id` tells torchrun's starts of one job apart; `agent_store`: torchrun's agent hosts the
    store.
    """

    dist_url: str
    net_interface: str | None
    job_id: str
    job_token_file: Path | None
    join_timeout: float
    dist_timeout: float
    start_id: str
    agent_store: bool


@dataclass(frozen=True)
class DataSettings:
    """The training data and the held-out data. `sources`, parsed from task_name, is rank 0's."""

    task_name: str
    sources: tuple[SourceSpec, ...]
    doc_separator: str | None
    train_on: Literal["all", "completion"]
    pack: Literal["concat", "document"]
    data_workers: int
    bad_lines: Literal["error", "skip"]
    max_bad_share: float
    evaluation_data: str | None
    evaluation_steps: int
    evaluation_num_batch: int | None

    def evaluates_after(self, step: int, *, total_steps: int) -> bool:
        """Returns whether an evaluation is due after iteration `step`."""
        every = self.evaluation_steps
        return step == total_steps or (every > 0 and step % every == 0)


@dataclass(frozen=True)
class UpdateSettings:
    """The size of batches, the number of updates and the optimizer.

    A step is an iteration; `gradient_accumulate_step` of them make an update. `batch_size` is the
    batch of one pipeline and `micro_batch_size` a microbatch, in sequences of `seq_length` tokens.
    """

    total_steps: int
    lr: float
    warmup_steps: int
    lr_schedule: Literal["linear", "cosine", "constant"]
    min_lr: float
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    seq_length: int
    batch_size: int
    micro_batch_size: int
    gradient_accumulate_step: int
    seed: int

    @property
    def total_updates(self) -> int:
        return self.total_steps // self.gradient_accumulate_step

    @property
    def num_microbatches(self) -> int:
        return self.batch_size // self.micro_batch_size

    def nominal_tokens(self, num_replicas: int) -> int:
        """Returns the predicted tokens of an update in which every token is trained."""
        sequences = self.gradient_accumulate_step * num_replicas * self.batch_size
        return sequences * (self.seq_length - 1)

    def begins_update(self, step: int) -> bool:
        return (step - 1) % self.gradient_accumulate_step == 0

    def ends_update(self, step: int) -> bool:
        return step % self.gradient_accumulate_step == 0


@dataclass(frozen=True)
class PrecisionSettings:
    """Precision, the loss scale of fp16, and what is traded for memory."""

    fp16: bool
    bf16: bool
    recompute: bool
    use_offload: bool
    cpu_matmul: Literal["auto", "default", "onednn"]
    loss_scale: float
    initial_loss_scale: float
    min_loss_scale: float
    loss_scale_window: int
    hysteresis: int
    max_skipped_updates: int

    @property
    def precision(self) -> Literal["fp32", "fp16", "bf16"]:
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"

    @property
    def scales_dynamically(self) -> bool:
        return self.fp16 and self.loss_scale == 0


@dataclass(frozen=True)
class CheckpointSettings:
    """Where and when steps are saved, and which of them are kept."""

    checkpoint_path: Path
    checkpoint_steps: int
    load_checkpoint: bool
    keep_checkpoints: int | None
    keep_optimizer_states: int | None
    async_checkpoint: bool
    checkpoint_failure: Literal["warn", "fatal"]
    grace_seconds: float

    def saves_after(self, step: int, update: UpdateSettings) -> bool:
        """Returns whether a save is due after iteration `step`.

        A save that is due inside an accumulation happens at the update that ends it.
        """
        if not update.ends_update(step):
            return False
        every = self.checkpoint_steps
        is_due = every > 0 and step // every > (step - update.gradient_accumulate_step) // every
        return is_due or step == update.total_steps


@dataclass(frozen=True)
class OutputSettings:
    """What a start prints or records besides training."""

    plan: bool
    device_memory: int | None
    measure_memory: bool
    preview_data: int | None
    check_cluster: bool
    project_name: str
    profiling: Literal["no-profiling", "tidy_profiling"]
    train_warmup_steps: int | None


@dataclass(frozen=True)
class Settings:
    """All settings of one rank."""

    model: ModelSettings
    parallel: ParallelSettings
    network: NetworkSettings
    data: DataSettings
    update: UpdateSettings
    precision: PrecisionSettings
    checkpoint: CheckpointSettings
    output: OutputSettings

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Settings":
        """Makes the groups from values by field name."""
        groups = get_type_hints(cls).items()
        return cls(
            **{
                name: group(**{field.name: values[field.name] for field in fields(group)})
                for name, group in groups
            }
        )

    def values(self) -> dict[str, Any]:
        """Returns the values of all groups by field name; `from_values` inverts it."""
        groups = (getattr(self, field.name) for field in fields(self))
        return {
            field.name: getattr(group, field.name) for group in groups for field in fields(group)
        }

    def changed(self, **changes: Any) -> "Settings":
        """Returns a copy with other values; the names are those of the groups' fields."""
        groups = {}
        for field in fields(self):
            group = getattr(self, field.name)
            names = {one.name for one in fields(group)} & changes.keys()
            groups[field.name] = replace(group, **{name: changes[name] for name in names})
        return Settings(**groups)
