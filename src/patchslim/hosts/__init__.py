"""Model families: one family a file; a leading underscore marks what is no family."""
