"""Weights in motion: declared layouts, explicit plans, executors that decide nothing.

::

    names, box, tiles      canonical parameters, boxes of them, tiles of storages
    layout, layout_*       trainer, engine and HF as tiles             (declarations; no torch)
    plan -> verify         the copies between two layouts, and an independent proof   (no torch)
    storages, hf           dicts of tensors; HF folders and new random models
    digest, publication    one number for a model in any layout; what control messages carry
    served_layout          layouts of a model served in FP8; blocks that straddle     (no torch)
    quantise               the arithmetic of FP8 blocks
    source_quantiser       each source rank writes its own served bytes
    delta, delta_chain     what changed since a version, for those who hold that version
    slots, arena           versions in memory, and in a file of shared memory
    executors              bytes: in a process, through shared memory, a GPU or a disk, over process
                           groups, along chains of engines

Whoever moves weights names two layouts; a new parallelism, engine or file format is a new
declaration, a new transport is a new executor. Nothing is served on trust: what arrives is digested
and compared with what was published.
"""
