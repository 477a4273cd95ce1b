"""What a command does from settings to a folder on disk: one technique (``run``), several side by side (``compare``),
a model's weights written anew (``convert``)."""
