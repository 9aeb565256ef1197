"""How the trainer is laid out and how it steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from npr_megatron.config.base import Section


class ParallelConfig(Section):
    """Megatron parallelism. World size = tp * cp * dp * pp; ep * etp divides tp * cp * dp."""

    tp_size: PositiveInt = 1
    """Tensor parallel; above 1 it brings sequence parallelism with it."""
    pp_size: PositiveInt = 1
    """Pipeline parallel (1F1B)."""
    dp_size: PositiveInt = 1
    """Data parallel, with the distributed optimizer."""
    cp_size: PositiveInt = 1
    """Context parallel: cuts rows, never weights; keys and values are gathered in each layer."""
    ep_size: PositiveInt = 1
    """Expert parallel, inside tp * cp * dp."""
    etp_size: PositiveInt | None = None
    """Tensor parallel of the routed experts; None: ``tp_size``."""
    vpp_size: PositiveInt = 1
    """Model chunks per pipeline stage (interleaved schedule)."""
    num_layers_in_first_stage: NonNegativeInt | None = None
    """Layers of the first pipeline stage, all its chunks together; None: an equal share."""
    num_layers_in_last_stage: NonNegativeInt | None = None
    account_for_embedding_in_pipeline_split: bool = False
    """The embedding counts as one layer of the first stage."""
    account_for_loss_in_pipeline_split: bool = False
    """The head and the loss count as one layer of the last stage."""
    pipeline_layout: str | None = None
    """Megatron's layout string, ``Et*3|t*4|t*4L``: replaces every other rule of the split."""
    overlap_data_parallel: bool = False
    """Gradients are reduced while backward runs, and new weights gathered while the next forward
    does."""
    vocab_divisor: PositiveInt = 1
    """Rows of embedding and head are padded to a multiple of vocab_divisor * tp (128 where
    Megatron's own scripts pad)."""

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp_size * self.cp_size * self.dp_size

    @property
    def world_size(self) -> int:
        """Trainer ranks."""
        return self.ranks_per_stage * self.pp_size

    @property
    def row_slices(self) -> int:
        """Equal slices of a row: two for each rank of context parallelism, which takes one early
        and one late, and each of them cut by sequence parallelism."""
        return self.tp_size * (2 * self.cp_size if self.cp_size > 1 else 1)

    @property
    def microbatch_multiple(self) -> int:
        """The number of microbatches of a step is a multiple of it: the same for every replica,
        and an interleaved schedule goes round the stages in full turns."""
        return self.dp_size * (self.pp_size if self.vpp_size > 1 else 1)

    @property
    def expert_tp_size(self) -> int:
        """Ranks that each routed expert is cut over."""
        return self.etp_size or self.tp_size

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Return the rows of embedding and head over all tp ranks, padding included."""
        multiple = self.vocab_divisor * self.tp_size
        return -(-vocab_size // multiple) * multiple


class TrainerConfig(Section):
    """Numerics and batch shapes of the trainer."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    row_tokens: PositiveInt = 256
    """Longest packed row [tokens]; a longer sample is refused."""
    rows_per_microbatch: PositiveInt = 8
    max_logprob_gap: PositiveFloat = 1e-3
    """Largest |trainer - engine| log-prob allowed on a rollout token before the run stops."""
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """How the linear layers scale to FP8; None: they compute in ``dtype``. Attention, norms,
    embedding and head stay in ``dtype`` either way."""
    fp8_params: bool = False
    """The linear layers keep their weights in FP8 only, and replicas gather them so; the optimizer
    keeps fp32 of its share. Not with delayed scaling."""
    num_first_layers_bf16: NonNegativeInt = 0
    """Leading layers that compute in ``dtype`` all the same; not with delayed scaling."""
    num_last_layers_bf16: NonNegativeInt = 0
    """Trailing layers likewise."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: nothing; core attention and dense MLPs;
    each layer from its input."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon orthogonalises the updates of matrices inside layers and leaves the rest to AdamW; it
    needs NVIDIA's package emerging_optimizers, and each replica keeps the whole state."""
    optimizer_offload_frac: float = Field(default=0.0, ge=0, le=1)
    """Share of AdamW's state that is kept, and updated, in the memory of the CPU."""
    max_skips_in_row: NonNegativeInt = 3
    """Steps in a row that are skipped because their loss or gradient is not finite, or their
    gradient spikes, before the run stops; 0: it stops at the first. So it does when not one step
    was taken yet."""
    spike_factor: float | None = Field(default=None, gt=1)
    """A gradient spikes whose norm is above this multiple of the median norm of the last
    ``spike_window`` steps; None: none does."""
    spike_window: PositiveInt = 32
    """Steps that must have been taken before any gradient is called a spike."""
    device_memory_gib: PositiveFloat | None = None
    """Memory of a trainer rank's device; given, what the rank is estimated to need must fit."""


class OptimizerConfig(Section):
    """AdamW with warm-up and decay."""

    learning_rate: PositiveFloat
    min_learning_rate_frac: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the last step / peak."""
    warmup_steps: NonNegativeInt = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: NonNegativeFloat = 0.0
    beta1: float = Field(default=0.9, gt=0, lt=1)
    beta2: float = Field(default=0.95, gt=0, lt=1)
    clip_grad: NonNegativeFloat = 1.0


class LossConfig(Section):
    """What distinguishes SFT, DAPO and PAPO: the loss on the same per-token log-probs."""

    kind: Literal["sft", "dapo", "papo"]
    clip_low: NonNegativeFloat = 0.2
    """DAPO only."""
    clip_high: NonNegativeFloat = 0.28
    """DAPO only."""
    dual_clip: float = Field(default=10.0, gt=1)
    """DAPO only: bound on ratio * |A| for negative advantages."""
