"""Images from folders, archives, datasets and shards."""
