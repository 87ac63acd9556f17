"""The mathematics: no files, no prints, no global seed, no device."""
