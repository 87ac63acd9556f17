"""The parts of a benchmark as Markdown tables. Standard library only."""


def shown(value):
    """Format one value: numbers to three digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, dict):
        value = [f"{name} {setting}" for name, setting in value.items() if setting not in ("", False)]
    if isinstance(value, list):
        return ", ".join(value)
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows):
    """Return the lines of a Markdown table of dicts; a column for each key, padded so that it reads well as text too."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[name.replace("_", " ") for name in names]] + [[shown(row.get(name)) for name in names] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [any(isinstance(row.get(name), int | float) for row in rows) for name in names]

    def line(texts):
        padded = (
            text.rjust(w) if right else text.ljust(w) for text, w, right in zip(texts, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = (
        "| "
        + " | ".join("-" * (w - 1) + (":" if right else "-") for w, right in zip(widths, numeric, strict=True))
        + " |"
    )
    return [line(cells[0]), rule, *map(line, cells[1:])]


def part(title, found):
    """Return the lines of one part: its title, its rows, and its notes as a list."""
    lines = [f"### {title}", ""]
    if found["rows"]:
        lines += [*table(found["rows"]), ""]
    lines += [f"- {note}" for note in found["notes"]]
    return [*lines, f"- measured in {found['seconds']:.0f} s", ""]


def document(results):
    """Return the lines of a whole benchmark: what it ran on and with, then its parts."""
    about = {**results["hardware"], **results["versions"], "date": results["date"], **results["configuration"]}
    lines = [
        f"- {name.replace('_', ' ')}: {shown(value)}" for name, value in about.items() if value not in (None, "", [])
    ]
    if results["left_out"]:
        lines.append(f"- left out: {'; '.join(results['left_out'])}")
    for name, found in results["parts"].items():
        lines += ["", *part(name, found)]
    return lines
