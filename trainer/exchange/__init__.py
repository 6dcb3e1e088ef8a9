"""Gradients and weights cross between hosts in few bits (--lan_compress, --lan_average), around DeepSpeed's engine."""
