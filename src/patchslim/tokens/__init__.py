"""The sequence of a vision transformer: rows, decisions about rows, attention."""
