"""What leaves a training for other programs, and the proof that they compute the same."""
