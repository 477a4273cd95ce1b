"""The training engine: one loop for every method and task, its optimizer, state, checkpoints and activation cache,
and the solver of linear heads. It knows no task and no method by name."""
