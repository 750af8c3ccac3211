"""What a variant of the low-rank update must say, one file each."""
