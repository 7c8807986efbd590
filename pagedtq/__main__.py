"""``python -m pagedtq`` is the command ``pagedtq``."""

import sys

from .cli import main

sys.exit(main())
