"""The parts of CoTo that act on a training loop: switches, hooks, optimizers, distributed runs."""
