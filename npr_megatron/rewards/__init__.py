"""Is the answer right, is the form kept, and what reward follows. Pure; no torch, no tokenizer."""
