"""The training loop, the step, and everything built around them."""
