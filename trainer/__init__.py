"""What runs in every slot (rank) of a training. Imports nothing from master/."""
