"""A run on this machine: its folder, the flags and the process that it was started with, what comes from a host."""
