"""Methods: one method a file; a leading underscore marks what is no method."""
