"""Device and process groups; the CUDA stand-in that lets unmodified Megatron-core run on CPU."""
