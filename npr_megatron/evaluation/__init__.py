"""What a set of trajectories is worth: validity, accuracy, faithfulness, length and width."""
