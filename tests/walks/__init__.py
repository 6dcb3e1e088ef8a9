"""First hours with lanspeed: what a person types by the README, from a bare clone on, and what they read."""
