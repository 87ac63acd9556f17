"""docs/equal_bits.py: its cells are flags of image_sample.py that have an effect."""

import equal_bits as study
from conftest import as_arguments

from guided_diffusion.config import SampleConfig, parse_config, unused_flags


def test_cells_are_flags_that_have_an_effect():
    files = dict.fromkeys(("segmenter", "features", "extractor", "model_path", "data_dir", "output"), "net.pt")
    options = study.parse(as_arguments(files))
    cells = [(part, cell) for part, cells in study.CELLS.items() for cell in cells]
    assert len(cells) > 15
    for part, cell in cells:
        config, given = parse_config(SampleConfig, "", study.cell_flags(part, cell, options))
        assert unused_flags(config, given) == [], (part, cell)
