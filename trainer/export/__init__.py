"""Export: models and weights in formats that need neither this project nor its checkpoints."""
