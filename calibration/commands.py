"""The verbs of calibration: `attnspan calibrate`, `plan CALIBRATION`, `eval`, `report` and `capture`."""

from __future__ import annotations

from typing import Any

from attnspan.calibration.calibrate_command import register_calibrate
from attnspan.calibration.capture_command import register_capture
from attnspan.calibration.eval_command import register_eval
from attnspan.calibration.plan_command import register_plan
from attnspan.calibration.report_command import register_report


def register(subparsers: Any, kinds: Any) -> None:
    """Add the verbs to a command line; kinds: the subparsers of `attnspan plan`."""
    register_calibrate(subparsers)
    register_plan(kinds)
    register_report(subparsers)
    register_eval(subparsers)
    register_capture(subparsers)
