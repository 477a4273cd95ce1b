"""The command line: ``capo``."""

from capotune.cli.main import main

__all__ = ["main"]
