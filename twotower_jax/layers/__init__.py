"""The layers of a tower: a file and a class per kind (`mixer.Mixer`), by their letters in `registry`."""
