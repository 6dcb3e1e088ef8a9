"""Text to rows of tokens: read, tokenized, packed, streamed."""
