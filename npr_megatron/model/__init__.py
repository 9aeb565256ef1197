"""The NPR GPT on Megatron-core."""
