"""Carry out ``verify``: find damage, name it, and with ``--repair`` mend it by pulling again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.cli.context import Context
    from stowray.pipeline.result import PullResult
    from stowray.pipeline.verify import Report


def verify_store(context: Context, references: tuple[str, ...], *, deep: bool, repair: bool) -> int:
    """Verify and return the exit status: 5 when damage stays."""
    from stowray.pipeline.source import parse_source
    from stowray.pipeline.verify import verify

    unversioned = _version(context, repair=repair)
    if unversioned is not None and not repair:
        # Without its version a store is not opened: nothing else of it can be judged.
        return _tell(context, unversioned, 5)
    store = context.open_store()
    names = [parse_source(text).canonical for text in references]
    report = verify(store, names or None, deep=deep, repair=repair)
    mended = True
    if report.damaged and repair:
        report = report.with_repair(_pull_again(context, report.references))
        mended = report.repaired is True
    if unversioned is not None:
        report = replace(report, damaged=unversioned.damaged + report.damaged).with_repair(mended)
    return _tell(context, report, 5 if report.damaged and not (repair and mended) else 0)


def _tell(context: Context, report: Report, status: int) -> int:
    if context.json:
        print(json.dumps(report.to_dict()))  # noqa: T201
    else:
        print(report.text())  # noqa: T201
    return status


def _version(context: Context, *, repair: bool) -> Report | None:
    """Return a report of a damaged version file, which has been mended if it was to be."""
    from stowray.pipeline.foundation import mend_version
    from stowray.pipeline.verify import Report
    from stowray.pipeline.verify_records import Damage

    path = context.store_path()
    if not path.is_dir():
        return None
    wrong = mend_version(path, repair=repair)
    if not wrong:
        return None
    damage = Damage("record", "", str(path / "version"), wrong)
    return Report(blobs=0, size=0, trees=0, damaged=(damage,), references=())


def _pull_again(context: Context, references: tuple[tuple[str, str, bool], ...]) -> bool:
    """Pull each damaged reference again; what is undamaged is found and not fetched."""
    from stowray.cli.work import Work
    from stowray.pipeline.engine import PullOptions
    from stowray.pipeline.platform import Platform
    from stowray.pipeline.source import parse_source

    statuses = []
    with Work(context) as work:
        for reference, platform, unpacked in references:
            options = PullOptions(
                platform=Platform.parse(platform) if platform else None,
                policy="missing",
                unpack=unpacked,
            )

            def pull(
                text: str, cancelled: Callable[[], bool], options: PullOptions = options
            ) -> PullResult:
                return work.engine.pull(parse_source(text), options, cancelled)

            statuses.append(work.each([reference], pull, lambda _result: None))
    return not any(statuses)
