"""State, intervals, generators and threads: what needs no other folder."""
