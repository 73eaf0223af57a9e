"""``stowray trace``: a run record as a picture of time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stowray.cli.context import command
from stowray.cli.observe import OUTPUT_FILE

if TYPE_CHECKING:
    from stowray.cli.context import Context


@command("trace", short_help="Draw a run record as a timeline, for a browser or Perfetto.")
@click.argument("record", metavar="RECORD", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["perfetto", "html"]),
    help="Default: html for an --output that ends in .html, else perfetto.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=OUTPUT_FILE,
    help="Where it goes; default: stdout.",
)
def trace_command(context: Context, record: Path, form: str | None, output: Path | None) -> int:
    """Turn RECORD, as `pull --record` and `bench --record` write it, into a timeline.

    perfetto: Trace Event JSON, which https://ui.perfetto.dev and chrome://tracing open. html: one
    page that needs no network and no scripts.
    """
    from stowray.pipeline.run_record import RunRecord

    kept = RunRecord.read(record)
    if form is None:
        form = "html" if output is not None and output.suffix in (".html", ".htm") else "perfetto"
    if form == "html":
        from stowray.trace_html import trace_page

        made = trace_page(kept)
    else:
        from stowray.trace_json import trace_document

        made = json.dumps(trace_document(kept)) + "\n"
    if output is None:
        print(made, end="")  # noqa: T201
    else:
        from stowray.pipeline.files import replace_file, translated
        from stowray.pipeline.run_record import file_mode

        with translated(output, "write the timeline"):
            replace_file(output, made.encode(), mode=file_mode())
        if not context.value("quiet"):
            print(output)  # noqa: T201
    return 0
