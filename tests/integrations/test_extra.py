"""Without the extra, the integration says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.model_libraries import MISSING


def test_models_are_tested_where_the_extra_is_installed():
    if MISSING:
        pytest.skip(f"the transformers extra is not installed ({', '.join(MISSING)} missing)")


@pytest.mark.slow
def test_a_missing_library_is_named_with_its_extra(tmp_path, root):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.path.insert(0, {str(root)!r})\n"
        "import pagedtq\n"
        "try:\n"
        "    import pagedtq.integrations.transformers\n"
        "except pagedtq.errors.BackendUnavailable as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == 'torch is not installed: pip install "pagedtq[transformers]"'
