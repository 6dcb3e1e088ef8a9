"""Key login set up on hosts, and taken away again."""
