"""Modules to ignore for doctests: without triton, or when it interprets, only the tests here can be imported."""

collect_ignore_glob = ["[!t]*.py", "tr*.py"]
