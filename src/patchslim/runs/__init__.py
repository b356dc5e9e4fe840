"""What long runs share: checkpoints, logs, progress, fingerprints."""
