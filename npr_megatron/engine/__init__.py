"""NPR Engine: branch-parallel decoding in plain torch."""
