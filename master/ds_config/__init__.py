"""A DeepSpeed config: its text read, its problems found, and those with one safe fix fixed."""
