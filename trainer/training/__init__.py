"""One training: from the options to the last step."""
