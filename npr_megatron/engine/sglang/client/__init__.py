"""What drives SGLang from outside: trajectories as stages."""
