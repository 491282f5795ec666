"""The settings of a training, and which of them exclude each other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Count = Annotated[int, Field(gt=0)]


class Strict(BaseModel):
    """What has the keys that it says and no others."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Training(Strict):
    """The optimization, of which every figure has a default."""

    steps: Count | None = Field(
        default=None, description="optimizer steps; takes the place of epochs"
    )
    epochs: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        default=None, description="passes over the training data (3)"
    )
    batch_size: Count = 8
    eval_batch_size: Count | None = Field(
        default=None, description="twice the batch size unless given"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1e36)] = 1e-3
    schedule: str = Field(
        default="linear",
        description="one of transformers' schedules: linear, cosine, constant…",
    )
    schedule_args: dict[str, bool | int | FiniteFloat | str] = Field(
        default={},
        description="what the schedule takes besides, such as num_decay_steps",
    )
    warmup: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="below 1 a share of the steps, else steps"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    optimizer: str = Field(
        default="adamw_torch",
        description="an optimizer that transformers' Trainer knows",
    )
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool | Count = Field(
        default=False, description="true: every block; 3: every third"
    )
    recompute: bool = Field(
        default=True,
        description="norms and activations are computed again rather than kept",
    )
    compile: Literal["regions"] | None = Field(
        default=None, description="regions: every block by torch.compile"
    )
    memory_budget: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="the share of what compiled blocks would keep that they may keep",
    )
    packing: bool | None = Field(
        default=None,
        description="rows end to end instead of padding; where the model can unless given",
    )
    tile: Count | None = Field(
        default=None,
        description="MLPs work on so many tokens at a time, for long rows: 512",
    )
    offload: bool = Field(
        default=False,
        description="what is kept for backward waits in the CPU's memory; CUDA only",
    )
    liger: bool = Field(default=False, description="the Liger kernels; CUDA only")
    mixed_precision: bool = Field(default=False, description="bf16 autocast; CUDA only")
    max_length: Annotated[int, Field(gt=1)] = Field(
        default=512,
        description="tokens of a row; longer ones are cut. Fewer unless given where "
        "the model has no positions for so many",
    )
    max_new_tokens: Count = Field(
        default=64,
        description="tokens of a generated answer, at most; fewer unless given where "
        "the model has no positions for them",
    )
    group_by_length: bool = Field(
        default=True, description="rows of like length share a batch: less padding"
    )
    labelled_logits: bool = Field(
        default=True,
        description="logits only where there is a label, where the model can",
    )
    checkpoint_every: Count | None = Field(
        default=None, description="steps between checkpoints"
    )
    log_every: Count = Field(
        default=10, description="steps between rows of metrics.jsonl"
    )
    eval_every: Count | None = Field(
        default=None, description="steps between evaluations on the validation split"
    )
    eval_rows: Count | None = Field(
        default=None,
        description="rows scored at most; the task's own limit unless given",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.steps and self.epochs:
            raise ValueError(
                "training.steps and training.epochs exclude each other: give one"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_recompute(self) -> Training:
        if self.memory_budget is not None and not self.compile:
            raise ValueError(
                "training.memory_budget is the compiler's: add training.compile=regions"
            )
        if self.compile and self.tile:
            raise ValueError(
                "training.compile excludes tile: training.memory_budget does its work"
            )
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "training.compile excludes gradient_checkpointing: training.memory_budget does its work"
            )
        return self

    @model_validator(mode="after")
    def _whole_warmup(self) -> Training:
        if self.warmup > 1 and not self.warmup.is_integer():
            raise ValueError(
                f"training.warmup: {self.warmup} is no whole number of steps"
            )
        return self
