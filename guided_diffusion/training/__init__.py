"""Training: loop, checkpoints, early stopping, devices, logs."""
