"""report.html: one file without links to elsewhere, whose script gets the numbers of a run or a sweep."""

import html
import json
import math
import re

from guided_diffusion.evaluation.html_report import write_report


def test_report_holds_what_is_there(tmp_path):
    row = {"name": "</main>'\"$x & é", "realised_snr_db": math.inf, "more": 1}

    def written(summary, *table):
        write_report(tmp_path, {"run": summary}, *table)
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "://" not in text and text.count("<script>") == text.count("</main>") == 1 and "<link" not in text
        return text, json.loads(html.unescape(re.search('data-run="(.*?)"', text)[1]))

    text, data = written(None, ("name", "psnr_db", "realised_snr_db"), [row])
    assert data["pictures"] == [{"name": row["name"], "psnr_db": None, "realised_snr_db": "inf"}]
    assert (data["summaries"], data["settings"]) == ({"run": None}, {}) and "<img" not in text
    for name, content in {"panel.png": "abc", "curves.png": "abc", "settings.json": '{"snr": Infinity}'}.items():
        (tmp_path / name).write_text(content)
    text, data = written(summary := {"mean": {"psnr_db": 20.5}})
    assert text.count('src="data:image/png;base64,YWJj"') == 2 and data["settings"] == {"snr": "inf"}
    assert data["summaries"] == {"run": summary}
