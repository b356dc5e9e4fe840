"""The slimmed model: the loop over the blocks, the check against the host, and `slim`."""
