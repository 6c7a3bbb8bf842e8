"""A run's folder and its checkpoints: written, found, checked and loaded."""
