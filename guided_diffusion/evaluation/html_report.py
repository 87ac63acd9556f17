"""report.html of a results folder or a sweep: one file with pictures and tables, sorted by a click on a title."""

import base64
import html
import json
import shlex
import sys
from pathlib import Path
from string import Template

from ..files import atomic_write

PAGE = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))  # its script makes the tables
NOT_JSON = {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}  # as in results.csv


def write_report(folder, summaries, columns=(), rows=()):
    """Write report.html: command, figures, means, the table of pictures and settings, as far as there are any.

    :param summaries: dict: point of a sweep (its folder's name) -> summary, or None.
    :param columns, rows: of results.csv.
    """
    figures = [path.read_bytes() for path in (folder / "panel.png", folder / "curves.png") if path.exists()]
    data = {"summaries": summaries, "pictures": [{name: row.get(name) for name in columns} for row in rows]}
    data["kind"] = "samples" if (folder / "samples").exists() else "local"
    data["settings"] = json.loads(path.read_text()) if (path := folder / "settings.json").exists() else {}
    data = json.loads(json.dumps(data), parse_constant=NOT_JSON.get)
    texts = {"title": folder.resolve().name, "command": shlex.join(["python", *sys.argv]), "data": json.dumps(data)}
    texts = {name: html.escape(text) for name, text in texts.items()}
    encoded = [base64.b64encode(png).decode() for png in figures]
    texts["figures"] = "\n".join(f'<img alt="" src="data:image/png;base64,{png}">' for png in encoded)
    with atomic_write(folder / "report.html", "wb") as f:
        f.write(PAGE.substitute(texts).encode(errors="replace"))
