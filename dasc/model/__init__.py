"""The network and its training: architecture, checkpoints, augmentation, losses, memory units, difficulty."""
