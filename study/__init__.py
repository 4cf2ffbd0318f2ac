"""What a run taught: the paper's analyses of trained checkpoints."""
