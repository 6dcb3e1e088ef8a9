"""What a training needs and how fast it is: each way on each choice of hosts, before anything starts."""
