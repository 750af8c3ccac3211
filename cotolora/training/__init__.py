"""What CoTo does to a training loop."""
