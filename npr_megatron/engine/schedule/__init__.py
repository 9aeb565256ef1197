"""Which flows run, and how one step's tokens are laid out: numpy only."""
