"""``python -m cotolora``: what runs here; what an adapter directory holds; merging directories."""

import sys

from cotolora.commands.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
