"""Checkpoints that are verified, kept, and split anew for another number of ranks."""
