"""What would go wrong with a run, found before the queue is waited for."""
