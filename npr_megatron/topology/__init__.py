"""Who sees whom, and at which position: one rule for trainer, engine, collator and viewer."""
