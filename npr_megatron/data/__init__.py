"""Prompts, demonstrations, tokenizers and packing."""
