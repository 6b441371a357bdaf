"""The registry under its earlier module name."""

from ftray.registry.registry import Registry
from ftray.registry.shelf import VERSION_FILE

__all__ = ["VERSION_FILE", "Registry"]
