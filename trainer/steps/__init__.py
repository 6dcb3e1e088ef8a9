"""What every method of training shares: verified checkpoints, finite losses, checked gradients."""
