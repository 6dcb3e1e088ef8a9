"""What is known of each host: its GPUs, its slots, its software, where lanspeed is there."""
