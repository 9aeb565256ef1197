"""One optimizer step for SFT, DAPO and PAPO; checkpoints; what a trainer rank can do."""
