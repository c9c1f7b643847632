"""Ranks and machines: launch, agreement, stops and the watchdog."""
