"""The trainer's flags: names, defaults, meanings, and the values that they take."""
