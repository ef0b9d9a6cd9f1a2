"""kvmanager: a paged KV-cache manager service for MLA models."""

__version__ = "0.1.0"
