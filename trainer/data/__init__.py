"""The shipped data, and the order of samples."""
