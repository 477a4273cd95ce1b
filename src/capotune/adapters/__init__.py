"""Adapters: a base with a method and a task's head on it, in memory (``assemble``) and on disk (``store``); merged into
the base's weights (``merge``); tied to their base by content (``fingerprint``)."""
