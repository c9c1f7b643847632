"""Plain nn.Modules; they know nothing of the trainer."""
