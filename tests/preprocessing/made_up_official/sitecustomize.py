"""Python imports this at its start where a test puts its folder on PYTHONPATH: made-up files then count as official.

The official files are not here, and no flag or variable of the project turns their verification off. So the tests of
`make data` give the script other blob ids, in OFFICIAL_BLOB_IDS as JSON, just before its `main` runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from finqa.runtime import errors

_report_errors = errors.report_errors


def report_errors(main: Callable[[], int | None]) -> int:
    main.__globals__.get("BLOB_IDS", {}).update(json.loads(os.environ["OFFICIAL_BLOB_IDS"]))
    return _report_errors(main)


errors.report_errors = report_errors
