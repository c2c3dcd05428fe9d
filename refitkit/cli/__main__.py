"""``python -m refitkit.cli``: the command line if the script ``refitkit`` is not on the path."""

import sys

from refitkit.cli.main import main

sys.exit(main())
