"""Text to sequences of tokens: read, tokenized, packed, streamed."""
