"""From pictures to a results folder: runs, metrics, codecs, panels, reports."""
