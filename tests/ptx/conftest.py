"""What doctests may import: without triton, and where it interprets, nothing here but the tests themselves."""

collect_ignore_glob = ["[!t]*.py", "tr*.py"]
