"""Fine-tunes slimmed models, and trains them from scratch."""
