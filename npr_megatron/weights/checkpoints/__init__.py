"""Weights on disk, in HF and Megatron ``torch_dist`` folders: read, converted, compared, checked.

Each format is one more layout, so that conversion is a transfer like any other, carried out piece
by piece in bounded memory.
"""
