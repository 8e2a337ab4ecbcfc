"""The demo keeps its promise: a killed worker costs time, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo_run.py"


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(180)
def test_the_survey_is_right_though_a_worker_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)} if os.geteuid() else dict(os.environ)

    demo = subprocess.run([sys.executable, DEMO], env=environment, capture_output=True, text=True, check=False)

    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "SIGKILL to worker" in demo.stdout
    assert "every file is counted exactly once" in demo.stdout
    assert demo.stderr == ""
