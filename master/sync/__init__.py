"""Files and environments brought to hosts: code, model, data, Python packages."""
