"""Libraries that hosts come from: one library a file, named as the module that is imported."""
