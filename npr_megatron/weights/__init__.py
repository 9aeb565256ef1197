"""Weights in motion: declared layouts, explicit plans, executors that decide nothing.

::

    names, box, tiles      canonical parameters, boxes of them, tiles of storages
    layout, layout_*       trainer, engine and HF as tiles             (declarations; no torch)
    plan -> verify         the copies between two layouts, and an independent proof   (no torch)
    storages, hf           dicts of tensors; HF folders and new random models
    digest, publication    one number for a model in any layout; what control messages carry
    arena, executors       bytes: inside a process, through shared memory, over gloo

Whoever moves weights names two layouts; a new parallelism, engine or file format is a new
declaration, a new transport is a new executor. Nothing is served on trust: what arrives is digested
and compared with what was published.
"""
