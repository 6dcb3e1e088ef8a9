"""Hosts compared with each other, and the network between them measured."""
