"""What memory a training needs; pure Python, without torch."""
