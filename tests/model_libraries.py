"""What tests of whole models need, and whether it is here."""

from __future__ import annotations

import importlib.util
import os

#: Set in CI, where a missing library is a failure and not a skip.
REQUIRED = "PAGEDTQ_REQUIRE_TRANSFORMERS"

#: Libraries of the ``transformers`` extra that cannot be imported here.
MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
if MISSING and os.environ.get(REQUIRED):
    raise RuntimeError(f"{REQUIRED} is set but {' and '.join(MISSING)} cannot be imported")
