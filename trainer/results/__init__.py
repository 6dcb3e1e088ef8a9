"""What a training leaves and says: its run folder, samples, model, summary."""
