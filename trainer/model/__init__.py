"""A causal language model: loaded, built anew, with an adapter, its documents kept apart."""
