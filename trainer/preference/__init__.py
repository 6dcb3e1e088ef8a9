"""Training on pairs of a better and a worse answer (DPO), whose loss TRL computes."""
