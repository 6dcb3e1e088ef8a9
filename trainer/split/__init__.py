"""A model whose layers are split over the ranks: each holds some of them, and activations go from one to the next."""
