"""Ranks and collectives, launchers, preflight checks, the watchdog, signals, logs and failure messages."""
