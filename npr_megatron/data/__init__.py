"""Problems, prompts, demonstrations and the way from token ids to packed rows.

``tokenizer`` knows a folder's tokenizer and proves the tags; ``sums`` and ``demonstrations`` are
the built-in task; ``problems``, ``sources`` and ``prompts`` bring any task to prompt ids;
``samples`` and ``packing`` bring token ids to the trainer. Everything is deterministic in names and
seeds, so a resumed run sees what an unbroken one would.
"""
