"""How far a cluster is: which hosts there may be, and what they still need before they can train."""
