"""The settings of a run: frozen dataclasses, created once from the command line.

Each field has the name of its flag; the help texts in `arguments.flag_table` explain the flags.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from arguments.values import LinkFlag
from pipeline_parallel.partition.split import Asked
from tasks.source_spec import SourceSpec


@dataclass(frozen=True)
class ModelSettings:
    """The settings of the model and of the split of its layers over the stages."""

    model_name: Path
    tokenizer_name: str
    model_type: str
    num_layers: Asked
    embedding_dim: int
    load_pretrained_model: bool


@dataclass(frozen=True)
class ParallelSettings:
    """The settings of the processes: stages, replicas, devices and backends."""

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
    """The settings of the network between the ranks.

    `start_id` identifies one start of the job by torchrun; it is "" without torchrun. `agent_store`
    says whether torchrun's agent hosts the TCPStore of the rendezvous. Timeouts are in seconds.
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
    """The settings of the training data and the held-out data.

    `sources` is parsed from --task-name on rank 0, and is empty on other ranks.
    """

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
    """The settings of the batches, the updates and the optimizer.

    A step is an iteration; `gradient_accumulate_step` iterations make one update. `batch_size` is
    the number of sequences in the batch of one pipeline. `micro_batch_size` is the number of
    sequences in a microbatch. A sequence has `seq_length` tokens.
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
        """Returns how many tokens an update predicts, over all replicas, if no token is masked."""
        sequences = self.gradient_accumulate_step * num_replicas * self.batch_size
        return sequences * (self.seq_length - 1)

    def begins_update(self, step: int) -> bool:
        return (step - 1) % self.gradient_accumulate_step == 0

    def ends_update(self, step: int) -> bool:
        return step % self.gradient_accumulate_step == 0


@dataclass(frozen=True)
class PrecisionSettings:
    """The settings of precision, fp16 loss scale, CPU matmuls, recompute, offload, determinism."""

    fp16: bool
    bf16: bool
    recompute: Literal["true", "false", "selective", "auto"]
    use_offload: bool
    cpu_matmul: Literal["auto", "default", "onednn"]
    deterministic: bool
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
    """The settings of checkpoints: their folder, when they are saved, and how many are kept."""

    checkpoint_path: Path
    checkpoint_steps: int
    load_checkpoint: bool
    keep_checkpoints: int | None
    keep_optimizer_states: int | None
    async_checkpoint: bool
    checkpoint_failure: Literal["warn", "fatal"]
    grace_seconds: float

    def saves_after(self, step: int, update: UpdateSettings) -> bool:
        """Returns whether a checkpoint must be saved after iteration `step`.

        A checkpoint that is due before the end of an update is saved when the update ends.
        """
        if not update.ends_update(step):
            return False
        every = self.checkpoint_steps
        is_due = every > 0 and step // every > (step - update.gradient_accumulate_step) // every
        return is_due or step == update.total_steps


@dataclass(frozen=True)
class OutputSettings:
    """The settings of the plan, the data preview, the cluster check and the reports."""

    plan: bool
    device_memory: int | None
    link: LinkFlag | None
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
        """Creates the settings from `values`, which maps the name of each field to its value."""
        groups = get_type_hints(cls).items()
        return cls(
            **{
                name: group(**{field.name: values[field.name] for field in fields(group)})
                for name, group in groups
            }
        )

    def values(self) -> dict[str, Any]:
        """Returns the values of all fields by field name; `from_values` is the inverse function."""
        groups = (getattr(self, field.name) for field in fields(self))
        return {
            field.name: getattr(group, field.name) for group in groups for field in fields(group)
        }

    def changed(self, **changes: Any) -> "Settings":
        """Returns a copy with new values for the fields named in `changes`."""
        groups = {}
        for field in fields(self):
            group = getattr(self, field.name)
            names = {one.name for one in fields(group)} & changes.keys()
            groups[field.name] = replace(group, **{name: changes[name] for name in names})
        return Settings(**groups)
