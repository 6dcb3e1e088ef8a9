"""What every other package may use: paths, the terminal, exit codes, files that are there whole or not at all."""
