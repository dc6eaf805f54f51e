"""What make sets up, whatever the shell that it is called from."""

from __future__ import annotations

import os
import subprocess

from finqa.runtime.paths import REPOSITORY


def test_packages_go_into_the_project_s_environment_where_another_one_is_active():
    shown = ["make", "--no-print-directory", "--eval", "shown: ; @echo $$VIRTUAL_ENV", "shown"]
    elsewhere = os.environ | {"VIRTUAL_ENV": "/elsewhere"}
    told = subprocess.run(shown, cwd=REPOSITORY, env=elsewhere, capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(REPOSITORY / ".venv")
