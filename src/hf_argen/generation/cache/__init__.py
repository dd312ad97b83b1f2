"""Key-value caches that decodings can fill, roll back and reorder."""

from .preallocated import PreallocatedCache, TreeView

__all__ = ["PreallocatedCache", "TreeView"]
