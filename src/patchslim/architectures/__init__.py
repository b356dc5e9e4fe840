"""Hosts that were published with a method and that no model library holds."""
