"""Vendor GEMMs with a hand-written backward: the backend of CPUs and of small eager batches."""
