"""ftray takes raw text to a live multi-tenant endpoint on one Ray cluster."""

__version__ = "0.1.0"
