"""Configuration: its schema, overrides, composition and targets."""
