"""What runs where you sit: tools are verbs, the modules they share are nouns."""
