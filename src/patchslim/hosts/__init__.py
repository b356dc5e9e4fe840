"""Model families: one family a file; a leading underscore marks what is no family."""

from patchslim.hosts._adapter import Adapter, HostFacts, Part

__all__ = ["Adapter", "HostFacts", "Part"]
