"""Weights in motion: declared layouts, explicit plans, executors that decide nothing.

::

    names, box, tiles      canonical parameters, boxes of them, tiles of storages     (no torch)
    layouts                trainer, engine, HF, torch_dist and FP8 as tiles           (no torch)
    plans, proof           the copies between two layouts; an independent verifier    (no torch)
    storages               dicts of tensors that follow a layout
    digest, publication    one number for a model in any layout; what control messages carry
    quantise, source_quantiser    the arithmetic of FP8 blocks; each source rank its own share of it
    delta, delta_chain     what changed since a version, for those who hold that version
    executors              bytes: in a process, through shared memory, a GPU or a disk, over process
                           groups, along chains of engines
    checkpoints            HF folders and Megatron checkpoints: read, written, converted, compared

Whoever moves weights names two layouts; a new parallelism, engine or file format is a new
declaration, a new transport is a new executor. Nothing is served on trust: what arrives is digested
and compared with what was published.
"""
