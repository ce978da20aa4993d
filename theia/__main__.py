"""``python -m theia`` is the same as ``theia``."""

import sys

from theia.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
