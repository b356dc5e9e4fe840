"""Plans: which method and schedule reach a target in milliseconds on this device, losing least."""
