"""A run, or several beside each other, as one HTML page that needs no script and asks for nothing from elsewhere."""
