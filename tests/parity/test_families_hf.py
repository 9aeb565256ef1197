"""Megatron's forward over shards cut by our layouts gives Hugging Face's log-probs, every family.

Layouts are compared with Megatron's own description elsewhere; here the numbers must come out, so
a matrix in the wrong place, of the wrong expert or upside down shows whatever it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.data.packing import pack
from npr_megatron.records.sample import PackedBatch
from npr_megatron.weights.checkpoints.hf import write_hf
from tests.distributed.harness import run_ranks
from tests.distributed.samples import branched_sample
from tests.parity.test_export_hf import MODELS, random_tensors
from tests.parity.test_trainer_hf import hf_logprobs, unpacked


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A model, how it is laid out, and what goes through it."""

    folder: Path
    model: ModelConfig
    parallel: ParallelConfig
    batches: tuple[PackedBatch, ...]


CASES = [
    ("llama", {"tp_size": 2}),
    ("qwen3", {"tp_size": 2}),
    ("qwen3_moe", {"tp_size": 2, "ep_size": 2, "etp_size": 1}),
    ("qwen3_moe, dense first", {"dp_size": 2, "ep_size": 2}),
    ("glm4_moe", {"tp_size": 2, "etp_size": 2}),
    ("glm4_moe, q/k norms", {"dp_size": 2, "ep_size": 2}),
]


def forward(rank, world_size, init_method, jobs: list[Forward]):
    """Return [B, S] log-probs of the labels of every batch of every job."""
    from megatron.core import parallel_state

    from npr_megatron.model.gpt import stage_inputs
    from npr_megatron.model.storages import stage_storages
    from npr_megatron.runtime import process_group
    from npr_megatron.runtime.device import device_scope
    from npr_megatron.weights.checkpoints.hf import read_hf
    from npr_megatron.weights.layouts import trainer_layout
    from npr_megatron.weights.storages import load_tiles
    from tests.distributed.live_models import build_chunks

    found = []
    for number, job in enumerate(jobs):
        info = process_group.RankInfo(
            rank=rank, world_size=world_size, init_method=f"{init_method}-{number}"
        )
        with device_scope(), torch.no_grad():
            process_group.start(info, job.parallel)
            chunks = build_chunks(job.model, job.parallel)
            layout = trainer_layout(job.model, job.parallel).ranks[rank]
            load_tiles(layout, read_hf(job.folder, job.model).read, stage_storages(chunks))
            alone = parallel_state.get_context_parallel_group()
            inputs = [
                stage_inputs(batch, batch, job.model, torch.float32, alone) for batch in job.batches
            ]
            found.append([chunks[0].eval()(**each)[0].numpy() for each in inputs])
            process_group.stop()
    return found


def reference(folder: Path):
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    if config.model_type == "glm4_moe":
        config.rope_parameters["partial_rotary_factor"] = 1.0
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation="eager"
    ).eval()


def test_logprobs_equal_those_of_hf(tmp_path):
    rng = np.random.default_rng(3)
    samples = [branched_sample(rng, num_blocks=1) for _ in range(2)]
    batches = pack(samples, 640, 1, 1)
    jobs = []
    for number, (name, sizes) in enumerate(CASES):
        folder, model = tmp_path / str(number), MODELS[name]
        write_hf(folder, model, random_tensors(model))
        parallel = ParallelConfig(**sizes)
        jobs.append(Forward(folder=folder, model=model, parallel=parallel, batches=batches))
    ranks = run_ranks(forward, 2, tmp_path, jobs)
    for number, (job, case) in enumerate(zip(jobs, CASES, strict=True)):
        hf = reference(job.folder)
        for sample in samples:
            expected = hf_logprobs(hf, sample)
            assert expected.std() > 0.1
            for found in ranks:
                logprobs = unpacked(batches, found[number], sample)
                np.testing.assert_allclose(logprobs, expected, atol=2e-5, err_msg=str(case))
