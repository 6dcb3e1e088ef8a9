"""The ranks of a training: how they meet, what they compute on, what they tell each other and DeepSpeed."""
