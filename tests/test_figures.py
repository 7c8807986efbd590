"""The figures on the pages are those of the committed results."""

import subprocess
import sys


def test_readme_and_performance_page_show_the_committed_results(root):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables", "--check"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
