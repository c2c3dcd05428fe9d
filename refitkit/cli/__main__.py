"""``python -m refitkit.cli``, for where the script ``refitkit`` is not on the path."""

import sys

from refitkit.cli.main import main

sys.exit(main())
