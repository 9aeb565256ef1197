"""The NPR GPT on Megatron-core."""

from npr_megatron.runtime.fused_kernels import hide_unusable

hide_unusable()  # before any module here, or any that needs one, imports Megatron
