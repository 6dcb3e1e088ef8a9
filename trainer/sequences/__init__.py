"""Tokenized documents to the sequences of a training: packed, streamed, mixed."""
