"""Faults made on purpose in a training of our own, to see what survives them on this cluster."""
