"""Doctor: find the problems of a run before it is submitted."""
