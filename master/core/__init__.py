"""What every other package of master may use: paths, the terminal, files that are there whole or not at all."""
