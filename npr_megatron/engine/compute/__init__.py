"""The model, its kernels and the draw of tokens: torch."""
